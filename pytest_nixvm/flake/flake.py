"""A flake as the tests see it: its machines, and the VM built of each."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from filelock import FileLock, Timeout

from pytest_nixvm.errors import (
    BuildError,
    FlakeError,
    MissingProgramError,
    NotAVirtualMachineError,
    SettingsError,
)
from pytest_nixvm.flake import explain, inputs
from pytest_nixvm.flake.build import MachineInfo, Override, VmBuild
from pytest_nixvm.flake.fingerprint import is_fixed
from pytest_nixvm.flake.nix import Answer, Nix, NixFailure
from pytest_nixvm.flake.reference import (
    FlakeReference,
    attribute_path,
    attribute_text,
    locate,
)
from pytest_nixvm.flake.remember import MODULES, Memory
from pytest_nixvm.progress import Progress, Silent, Step

__all__ = ["Flake", "MachineInfo", "VmBuild"]

_WRAPPER = f"path:{MODULES}#this"
_NO_SUCH_INPUT = re.compile(r"--override-input target/(\S+) .*does not match any input")


class Flake:
    """One flake, evaluated and built on demand.

    nix = Nix.find()
    flake = Flake(FlakeReference.parse(".#dev-vm", Path.cwd()), nix=nix, cache=cache)
    vm = flake.build(flake.machines()[0].name)

    `override_inputs` are pairs of an input's name and the reference to use in its place. `cache`
    is a directory that outlives the session; results are rooted there, and what an unchanged
    flake gave is remembered there. `logs`, if given, gets the output of evaluations and builds.
    Timeouts are in seconds.
    """

    def __init__(
        self,
        reference: FlakeReference,
        *,
        nix: Nix,
        cache: Path,
        override_inputs: Sequence[tuple[str, str]] = (),
        progress: Progress | None = None,
        logs: Path | None = None,
        evaluation_timeout: float = 600,
        build_timeout: float = 7200,
    ) -> None:
        self.reference = reference
        self.nix = nix
        self._cache = cache.absolute()
        self._progress = progress or Silent()
        self._logs = logs
        self._evaluation_timeout = evaluation_timeout
        self._build_timeout = build_timeout
        cwd = Path.cwd()
        self._overrides = [(name.strip("/"), locate(ref, cwd)) for name, ref in override_inputs]
        self._url = reference.url
        self._ready: Memory | None = None
        self._machines: tuple[MachineInfo, ...] | None = None

    # --- what others ask ---------------------------------------------------------------------

    def machines(self) -> tuple[MachineInfo, ...]:
        """Return the flake's machines, or just the one its reference names.

        One evaluation, remembered between runs. Machines that can't run here (Darwin, another
        architecture) are listed with the reason in `skip`.

        Raises:
            FlakeError: there is no flake, no such attribute, nothing that could be tested.
            EvaluationError: Nix can't evaluate the listing.
        """
        if self._machines is None:
            attribute = self.reference.attribute
            if attribute is None or attribute == "nixosConfigurations":
                self._machines = self._list()
            else:
                self._machines = (self._named(attribute),)
        return self._machines

    def build(self, name: str) -> VmBuild:
        """Evaluate and build a machine's VM, or find that this was done before.

        Sessions and xdist workers that want the same machine at the same time share the work.

        Raises:
            FlakeError: there is no machine of that name, or it can't run here.
            EvaluationError: Nix can't evaluate it.
            BuildError: Nix can't build it.
            NotAVirtualMachineError: what was built is no VM.
        """
        info = self._info(name)
        memory = self._memory()
        question = f"plan {info.attribute}"
        apply = f"plan {_nix_list(attribute_path(info.attribute))}"
        root = self._root(info)
        plan = memory.recall(question)
        if plan is not None and self._is_built(plan, root):
            return self._result(info, plan, 0.0, 0.0)
        with self._lock(memory.name(question), self._build_timeout):
            plan, evaluated = self._ask(question, apply, info.name, info.attribute)
            self._check_plan(info, plan)
            if evaluated == 0.0 and not self._can_realise(plan):
                memory.forget(question)  # the store was cleaned since
                plan, evaluated = self._ask(question, apply, info.name, info.attribute)
            built = 0.0 if self._is_built(plan, root) else self._realise(info, plan, root)
        return self._result(info, plan, evaluated, built)

    # --- the list ----------------------------------------------------------------------------

    def _list(self) -> tuple[MachineInfo, ...]:
        answer, _ = self._ask("machines", "", self._what(), None)
        systems: dict[str, str | None] = answer["systems"]
        found = [
            MachineInfo(name, attribute_text(["nixosConfigurations", name]), *self._runs(system))
            for name, system in systems.items()
        ]
        for name in answer["darwin"]:
            if name not in systems:
                reason = "a Darwin (macOS) host: it has no NixOS to boot"
                attribute = attribute_text(["darwinConfigurations", name])
                found.append(MachineInfo(name, attribute, "darwin", reason))
        if not found:
            raise FlakeError(
                f"{self._what()} has no nixosConfigurations. Its outputs are: "
                f"{_listed(answer['outputs'])}. Name what to test: --nixvm-flake=REF#ATTRIBUTE."
            )
        return tuple(found)

    def _systems(self, write: Any) -> Answer:
        """The list in one call; if a host breaks it, its name remains, and the others' systems."""
        both = "{ inherit (this) source; answer = { inherit (this) systems; } // this.names; }"
        try:
            return self._evaluate(both, write)
        except NixFailure as failure:
            names = "{ inherit (this) source; answer = this.names; }"
            answer = self._evaluate(names, write)  # fails again if the flake as a whole is at fault
            systems: dict[str, str | None] = {}
            for name in answer.value["answer"]["nixos"]:
                systems[name] = None
                if failure.timeout is None:
                    with contextlib.suppress(NixFailure):
                        single = f"this.system {_nix_string(name)}"
                        systems[name] = self._evaluate(single, write).value
            answer.value["answer"]["systems"] = systems
            return answer

    def _named(self, attribute: str) -> MachineInfo:
        paths = self._candidates(attribute)
        apply = f"describe [ {' '.join(_nix_list(path) for path in paths)} ]"
        answer, _ = self._ask(f"describe {attribute}", apply, self._what(), attribute)
        if not answer["found"]:
            raise FlakeError(self._no_such_attribute(attribute, answer["siblings"]))
        path: list[str] = answer["path"]
        text = attribute_text(path)
        if answer["kind"] == "other":
            raise NotAVirtualMachineError(
                f"{text} of {self._what()} is neither a NixOS configuration nor a derivation."
            )
        name = path[-1]
        if path[0] == "nixosConfigurations" and len(path) > 1:
            name = path[1]
        return MachineInfo(name, text, *self._runs(answer["system"]))

    def _candidates(self, attribute: str) -> list[list[str]]:
        """Where an attribute is looked for: machines first, then as nix does."""
        absolute = attribute.startswith(".")
        path = attribute_path(attribute.lstrip(".") if absolute else attribute)
        if absolute:
            return [path]
        system = self.nix.system
        found = [["packages", system, *path], ["legacyPackages", system, *path], path]
        if len(path) == 1:
            found.insert(0, ["nixosConfigurations", *path])
        elif path[0] == "nixosConfigurations":
            found = [path]
        return found

    def _runs(self, system: str | None) -> tuple[str, str | None]:
        """Return the system, and why it can't run here, if so."""
        here = self.nix.system
        if not system or system == here or (system, here) == ("i686-linux", "x86_64-linux"):
            return system or "", None
        return system, f"it is for {system}, this machine is {here}"

    def _info(self, name: str) -> MachineInfo:
        every = self.machines()
        for info in every:
            if info.name == name:
                if info.skip is not None:
                    raise FlakeError(f"{name} of {self._what()} can't be tested here: {info.skip}.")
                return info
        names = [info.name for info in every]
        raise FlakeError(
            f"{self._what()} has no machine {name}{_near(name, names)} It has: {_listed(names)}."
        )

    def _no_such_attribute(self, attribute: str, siblings: Sequence[Sequence[str]]) -> str:
        machines = sorted({p[1] for p in siblings if len(p) == 2 and p[0] == "nixosConfigurations"})
        wanted = attribute_path(attribute.lstrip("."))
        machine = len(wanted) == 1 or wanted[0] == "nixosConfigurations"
        others = [attribute_text(list(path)) for path in siblings]
        last = {path[-1]: attribute_text(list(path)) for path in siblings}
        near = [] if not machine else difflib.get_close_matches(wanted[-1], machines, 3, 0.6)
        near = near or difflib.get_close_matches(attribute, others, 3, 0.7)
        near = near or [last[n] for n in difflib.get_close_matches(wanted[-1], last, 3, 0.7)]
        text = f"{self._what()} has no {attribute}."
        if near:
            text += f" Did you mean {' or '.join(near)}?"
        if machine:
            text += (
                f" Its machines are: {_listed(machines)}." if machines else " It has no machines."
            )
        elif others and not near:
            text += f" There is: {_listed(others)}."
        return text

    # --- evaluation --------------------------------------------------------------------------

    def _ask(
        self, question: str, apply: str, title: str, attribute: str | None
    ) -> tuple[dict[str, Any], float]:
        """Return an answer and the seconds it took, 0 if it was remembered."""
        memory = self._memory()
        answer = memory.recall(question)
        if answer is not None:
            return answer, 0.0
        with self._lock("ask-" + memory.name(question), self._evaluation_timeout):
            answer = memory.recall(question)
            if answer is not None:
                return answer, 0.0
            step = self._progress.step(f"Evaluating {title}")
            began = time.monotonic()
            try:
                answer = self._ask_nix(question, apply, attribute, step)
            except BaseException as error:
                step.fail("" if not isinstance(error, FlakeError) else "failed")
                raise
            step.finish()
            return answer, time.monotonic() - began

    def _ask_nix(
        self, question: str, apply: str, attribute: str | None, step: Step
    ) -> dict[str, Any]:
        memory = self._memory()
        urls = [self._url, *(url for _, (url, _) in self._overrides)]
        before = memory.digests(urls)
        self._step = step
        with self._log_file(f"evaluate-{attribute or 'machines'}") as (write, _):
            try:
                if question == "machines":
                    answer = self._systems(write)
                else:
                    both = f"{{ inherit (this) source; answer = this.{apply}; }}"
                    answer = self._evaluate(both, write)
            except NixFailure as failure:
                self._check_overrides(failure.log.warnings)
                raise explain.evaluation_failed(failure, self._subject(attribute)) from None
        self._check_overrides(answer.warnings)
        trees = self._trees(answer.value["source"], before)
        if trees is not None:
            self._write(memory, question, trees, answer.value["answer"])
        result: dict[str, Any] = answer.value["answer"]
        return result

    def _evaluate(self, body: str, write: Any = None) -> Answer:
        return self.nix.evaluate(
            _WRAPPER,
            f"this: {body}",
            overrides=self._nix_overrides("target/"),
            timeout=self._evaluation_timeout,
            watch=self._step.update,
            write=write,
        )

    def _trees(self, source: str, before: Mapping[str, str | None]) -> dict[str, str] | None:
        """Return the digests of all that was read, None if nix would look some of it up afresh.

        An error here only means that nothing is remembered.
        """
        if not self.nix.pure:
            return None
        memory = self._memory()
        try:
            graph = self._graph()
            lock_file = Path(source) / self._folder() / "flake.lock"
            overrides = {tuple(name.split("/")): url for name, (url, _) in self._overrides}
            found = inputs.dependencies(graph, lock_file, overrides)
        except (NixFailure, KeyError, TypeError, AttributeError):
            return None
        if found.unsettled:
            return None
        extra = memory.digests(found.local - before.keys())
        now = memory.digests([*before, *extra])
        # What changed while nix was reading belongs to no digest.
        if any(now[url] != digest for url, digest in {**before, **extra}.items()):
            return None
        trees = {url: digest for url, digest in now.items() if digest is not None}
        return trees if len(trees) == len(now) else None

    def _graph(self) -> dict[str, Any]:
        answer = self.nix.metadata(
            f"path:{MODULES}",
            overrides=self._nix_overrides("target/"),
            timeout=self._evaluation_timeout,
        )
        graph: dict[str, Any] = answer.value["locks"]
        return graph

    def _check_overrides(self, warnings: Sequence[str]) -> None:
        """Nix only warns of an override for an input that the flake does not have."""
        for warning in warnings:
            found = _NO_SUCH_INPUT.search(warning)
            if not found:
                continue
            try:
                names = inputs.input_names(self._graph())
            except (NixFailure, KeyError, TypeError):
                names = []
            has = f"Its inputs are: {_listed(names)}." if names else "It has no inputs."
            raise FlakeError(
                f"--nixvm-override-input {found[1]}: {self._what()} has no such input"
                f"{_near(found[1], names)} {has}"
            )

    def _nix_overrides(self, prefix: str) -> list[tuple[str, str]]:
        target = [("target", self._url)] if prefix else []
        return [*target, *((prefix + name, url) for name, (url, _) in self._overrides)]

    # --- building ----------------------------------------------------------------------------

    def _check_plan(self, info: MachineInfo, plan: Mapping[str, Any]) -> None:
        what = f"{info.attribute} of {self._what()}"
        if plan.get("noVm"):
            raise NotAVirtualMachineError(
                f"{what} can't be built as a VM: it has no config.system.build.vm."
            )
        if "derivation" not in plan:
            raise NotAVirtualMachineError(
                f"{what} is neither a NixOS configuration nor a derivation."
            )
        program = plan.get("mainProgram")
        if program is not None and not re.fullmatch(r"run-.*-vm", program):
            raise NotAVirtualMachineError(
                f"{what} is no VM: its program is bin/{program}, a VM's is bin/run-NAME-vm."
            )

    def _can_realise(self, plan: Mapping[str, Any]) -> bool:
        return Path(plan["output"]).exists() or Path(plan["derivation"]).exists()

    def _is_built(self, plan: Mapping[str, Any], root: Path) -> bool:
        output = Path(plan.get("output", "/nonexistent"))
        try:
            return output.exists() and root.readlink() == output
        except OSError:
            return False

    def _realise(self, info: MachineInfo, plan: Mapping[str, Any], root: Path) -> float:
        step = self._progress.step(f"Building {info.name}")
        began = time.monotonic()
        try:
            with self._log_file(f"build-{info.name}") as (write, path):
                try:
                    self.nix.realise(
                        plan["derivation"] if Path(plan["derivation"]).exists() else plan["output"],
                        plan["outputName"] if Path(plan["derivation"]).exists() else "",
                        root,
                        timeout=self._build_timeout,
                        watch=step.update,
                        write=write,
                    )
                except NixFailure as failure:
                    subject = self._subject(info.attribute)
                    raise explain.build_failed(failure, subject, path) from None
            self._root_named(root, plan)
        except BaseException as error:
            step.fail("failed" if isinstance(error, FlakeError) else "")
            raise
        step.finish()
        return time.monotonic() - began

    def _root_named(self, root: Path, plan: Mapping[str, Any]) -> None:
        """Nix appends the output's name to the root's unless that is `out`."""
        if plan["outputName"] != "out":
            named = root.with_name(f"{root.name}-{plan['outputName']}")
            if named.is_symlink():
                root.unlink(missing_ok=True)
                root.symlink_to(named.readlink())

    def _result(
        self, info: MachineInfo, plan: Mapping[str, Any], evaluated: float, built: float
    ) -> VmBuild:
        output = Path(plan["output"])
        scripts = sorted(output.glob("bin/run-*-vm"))
        if not scripts:
            programs = sorted(path.name for path in output.glob("bin/*"))
            raise NotAVirtualMachineError(
                f"{info.attribute} of {self._what()} is no VM: its build has no bin/run-NAME-vm"
                + (f", only {_listed(programs)}" if programs else "")
                + f" ({output})."
            )
        system = output / "system"
        return VmBuild(
            name=info.name,
            attribute=info.attribute,
            start_script=scripts[0],
            output=output,
            toplevel=system.resolve() if system.exists() else None,
            system=plan.get("system") or info.system or self.nix.system,
            overrides=tuple(
                Override(attribute_text(o["option"]), _nix_value(o["value"]), o["reason"])
                for o in plan["overrides"]
            ),
            evaluated=evaluated,
            built=built,
        )

    # --- places ------------------------------------------------------------------------------

    def _memory(self) -> Memory:
        if self._ready is not None:
            return self._ready
        if self._url.startswith("git+file:") or any(
            url.startswith("git+") for _, (url, _) in self._overrides
        ):
            _need_git()
        for name in ("evaluations", "roots", "locks"):
            self._directory(name)
        if not self._url.startswith(("path:", "git+file:")) and not is_fixed(self._url):
            self._url = self._resolve()
        about = [self._url, [[name, url] for name, (url, _) in self._overrides], self.nix.identity]
        self._ready = Memory(self._cache / "evaluations", about)
        return self._ready

    def _resolve(self) -> str:
        """Ask what a remote reference means today: evaluations are remembered by that."""
        self._step = step = self._progress.step(f"Looking up {self.reference.url}")
        try:
            answer = self.nix.metadata(
                self._url,
                overrides=self._nix_overrides(""),
                timeout=self._evaluation_timeout,
                watch=step.update,
            )
        except NixFailure as failure:
            step.fail("failed")
            raise explain.evaluation_failed(failure, self._subject(None)) from None
        step.finish()
        url = answer.value.get("lockedUrl") or answer.value["url"]
        return str(url)

    def _directory(self, name: str) -> Path:
        path = self._cache / name
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
            probe = path / f".probe-{time.monotonic_ns()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise self._bad_cache(error) from error
        return path

    def _bad_cache(self, error: OSError) -> SettingsError:
        return SettingsError(
            f"The cache directory {self._cache} can't be written: {error.strerror}. "
            "Make room there or name another: --nixvm-cache=DIR."
        )

    def _write(
        self, memory: Memory, question: str, trees: Mapping[str, str], answer: Mapping[str, Any]
    ) -> None:
        try:
            memory.record(question, trees, answer)
        except OSError as error:
            raise self._bad_cache(error) from error

    def _root(self, info: MachineInfo) -> Path:
        """Where the result is rooted: one place a machine, so that old results are let go."""
        about = json.dumps([self.reference.url, info.attribute, self._nix_overrides("")])
        digest = hashlib.blake2b(about.encode(errors="surrogateescape"), digest_size=6).hexdigest()
        name = re.sub(r"[^A-Za-z0-9._-]", "_", info.name)
        return self._cache / "roots" / f"{name}-{digest}"

    @contextlib.contextmanager
    def _lock(self, name: str, timeout: float) -> Iterator[None]:
        """Let one process at a time do a piece of work that others want as well."""
        lock = FileLock(self._cache / "locks" / f"{name}.lock")
        try:
            try:
                lock.acquire(timeout=0)
            except Timeout:
                step = self._progress.step("Waiting for another session that does the same")
                try:
                    lock.acquire(timeout=timeout, poll_interval=0.1)
                except BaseException:
                    step.fail()
                    raise
                step.finish()
        except Timeout:
            raise BuildError(
                f"Another session has worked on the same machine for {timeout:g} s and still does "
                f"(it holds {lock.lock_file})."
            ) from None
        except OSError as error:
            raise self._bad_cache(error) from error
        try:
            yield
        finally:
            lock.release()

    @contextlib.contextmanager
    def _log_file(self, name: str) -> Iterator[tuple[Any, Path | None]]:
        """Yield a function that writes lines to `logs`, and the file; it is made on first use."""
        if self._logs is None:
            yield None, None
            return
        path = self._logs / f"{re.sub(r'[^A-Za-z0-9._-]', '_', name)}.log"
        with contextlib.ExitStack() as stack:
            opened: list[Any] = []

            def write(line: str) -> None:
                if not opened:
                    try:
                        path.parent.mkdir(parents=True, exist_ok=True)
                        opened.append(stack.enter_context(path.open("w", buffering=1)))
                    except OSError as error:
                        raise SettingsError(
                            f"{path} can't be written: {error.strerror}."
                        ) from error
                opened[0].write(line + "\n")

            yield write, path

    # --- words -------------------------------------------------------------------------------

    def _what(self) -> str:
        local = self.reference.local
        return str(local) if local is not None else self.reference.url

    def _folder(self) -> str:
        return dict(parse_qsl(self._url.partition("?")[2])).get("dir", "")

    def _subject(self, attribute: str | None) -> explain.Subject:
        what = f"{attribute} of {self._what()}" if attribute else self._what()
        trees = []
        places = [(self.reference.url, self.reference.local)]
        places += [place for _, place in self._overrides]
        for url, local in places:
            if local is not None:
                folder = dict(parse_qsl(url.partition("?")[2])).get("dir", "")
                top = local.parents[len(Path(folder).parts) - 1] if folder else local
                trees.append(explain.Tree(top, url.startswith("git+file:"), url))
        return explain.Subject(what, self.reference.url, trees)


def _need_git() -> None:
    if shutil.which("git") is None:
        raise MissingProgramError(
            "git was not found in PATH; nix needs it to read a flake in a git repository. Install "
            "it, or name the directory as path:DIR, which nix reads without git."
        )


def _nix_string(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("${", "\\${")
    return f'"{escaped}"'


def _nix_list(texts: Sequence[str]) -> str:
    return f"[ {' '.join(map(_nix_string, texts))} ]"


def _nix_value(value: object) -> str:
    return _nix_string(value) if isinstance(value, str) else json.dumps(value)


def _near(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, 3, 0.6)
    return f". Did you mean {' or '.join(near)}?" if near else "."


def _listed(names: Sequence[str], most: int = 20) -> str:
    shown = ", ".join(names[:most])
    return f"{shown}, … ({len(names)} in all)" if len(names) > most else shown or "none"
