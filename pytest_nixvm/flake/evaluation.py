"""Questions about a flake, answered by nix once and from memory as long as nothing changes."""

from __future__ import annotations

import contextlib
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote

from pytest_nixvm.errors import FlakeError, MissingProgramError
from pytest_nixvm.flake import explain, inputs
from pytest_nixvm.flake.fingerprint import is_fixed
from pytest_nixvm.flake.messages import Watcher
from pytest_nixvm.flake.nix import Answer, Nix, NixFailure
from pytest_nixvm.flake.places import Cache, Writer, log_file
from pytest_nixvm.flake.reference import FlakeReference, locate
from pytest_nixvm.flake.remember import MODULES, Memory
from pytest_nixvm.flake.subject import Subject, Tree
from pytest_nixvm.flake.words import listed, near, nix_string
from pytest_nixvm.progress import Progress, Silent

_WRAPPER = f"path:{quote(str(MODULES))}"
_NO_SUCH_INPUT = re.compile(r"--override-input target/(\S+) .*does not match any input")

MACHINES = "machines"  # the one question that is answered host by host if need be


class Evaluator:
    """Evaluates one flake with its overrides.

    `ask` returns the answer to an expression on `this` (modules/target.nix) and the seconds it
    took, 0 if it was remembered.
    """

    def __init__(
        self,
        reference: FlakeReference,
        *,
        nix: Nix,
        cache: Cache,
        override_inputs: Sequence[tuple[str, str]],
        progress: Progress,
        logs: Path | None,
        timeout: float,
    ) -> None:
        self.reference = reference
        self._nix = nix
        self._cache = cache
        self._progress = progress
        self._logs = logs
        self._timeout = timeout
        self._url = reference.url
        self._places = [(reference.url, reference.local)]
        self._memory: Memory | None = None
        self._graphs: list[tuple[Mapping[str, str | None], dict[str, Any]]] = []
        self.overrides: list[tuple[str, str]] = []
        for name, text in override_inputs:
            try:
                url, local = locate(text, Path.cwd())
            except FlakeError as error:
                raise FlakeError(f"--nixvm-override-input {name} {text}: {error}") from None
            self.overrides.append((name.strip("/"), url))
            self._places.append((url, local))

    @property
    def what(self) -> str:
        """The flake, as the user knows it."""
        local = self.reference.local
        return str(local) if local is not None else self.reference.url

    def subject(self, attribute: str | None) -> Subject:
        """Return what an error message needs to know."""
        trees = []
        for url, local in self._places:
            if local is not None:
                depth = len(Path(_parameters(url).get("dir", "")).parts)
                root = local.parents[depth - 1] if depth else local
                trees.append(Tree(root, local, url.startswith("git+file:")))
        what = f"{attribute} of {self.what}" if attribute else self.what
        return Subject(what, self.reference.url, trees)

    def memory(self) -> Memory:
        """Return what is remembered of this flake, after looking whether it can be used at all.

        Raises:
            MissingProgramError: nix will need git, and there is none.
            SettingsError: the cache can't be written.
            FlakeError: a remote reference can't be resolved.
        """
        if self._memory is None:
            if any(url.startswith("git+") for url, _ in self._places):
                _need_git()
            self._cache.prepare()
            if not self._url.startswith(("path:", "git+file:")) and not is_fixed(self._url):
                self._url = self._resolve()
            about = [self._url, [list(pair) for pair in self.overrides], self._nix.identity]
            self._memory = Memory(self._cache.evaluations, about)
        return self._memory

    def ask(
        self,
        question: str,
        expression: str,
        *,
        title: str,
        attribute: str | None = None,
        quiet: bool = False,
    ) -> tuple[dict[str, Any], float]:
        """Answer `question` (its name in the memory) by evaluating `expression`.

        With `quiet` that is no step for the user to see.

        Raises:
            FlakeError, EvaluationError: see `explain`.
        """
        memory = self.memory()
        answer = memory.recall(question)
        if answer is not None:
            return answer, 0.0
        name = f"ask-{memory.name(question)}"
        progress = Silent() if quiet else self._progress
        with self._cache.lock(name, progress, timeout=self._timeout):
            answer = memory.recall(question)
            if answer is not None:
                return answer, 0.0
            step = progress.step(f"Evaluating {title}")
            began = time.monotonic()
            try:
                answer = self._ask_nix(memory, question, expression, attribute, step.update)
            except BaseException as error:
                step.fail("failed" if isinstance(error, FlakeError) else "")
                raise
            step.finish()
            return answer, time.monotonic() - began

    def _ask_nix(
        self, memory: Memory, question: str, expression: str, attribute: str | None, watch: Watcher
    ) -> dict[str, Any]:
        before = memory.digests([self._url, *(url for _, url in self.overrides)])
        with log_file(self._logs, f"evaluate-{attribute or MACHINES}") as (write, _):
            try:
                if question == MACHINES:
                    answer = self._list(watch, write)
                else:
                    answer = self._evaluate(_with_source(expression), watch, write)
            except NixFailure as failure:
                self._check_overrides(failure.log.warnings)
                raise explain.evaluation_failed(failure, self.subject(attribute)) from None
        self._check_overrides(answer.warnings)
        result: dict[str, Any] = answer.value["answer"]
        trees = self._trees(memory, answer.value["source"], before)
        if trees is not None:
            try:
                memory.record(question, trees, result)
            except OSError as error:
                raise self._cache.unusable(error) from error
        return result

    def _list(self, watch: Watcher, write: Writer | None) -> Answer:
        """List the machines in one call; if a host breaks that, ask for each host by itself."""
        try:
            whole = _with_source("{ inherit (this) systems; } // this.names")
            return self._evaluate(whole, watch, write)
        except NixFailure as failure:
            # Fails again if the flake as a whole is at fault.
            answer = self._evaluate(_with_source("this.names"), watch, write)
            systems: dict[str, str | None] = {}
            for name in answer.value["answer"]["nixos"]:
                systems[name] = None
                if failure.timeout is None:
                    with contextlib.suppress(NixFailure):
                        single = f"this.system {nix_string(name)}"
                        systems[name] = self._evaluate(single, watch, write).value
            answer.value["answer"]["systems"] = systems
            return answer

    def _evaluate(self, body: str, watch: Watcher, write: Writer | None) -> Answer:
        return self._nix.evaluate(
            f"{_WRAPPER}#this",
            f"this: {body}",
            overrides=self._overridden("target/"),
            timeout=self._timeout,
            watch=watch,
            write=write,
        )

    def _trees(
        self, memory: Memory, source: str, before: Mapping[str, str | None]
    ) -> dict[str, str] | None:
        """Return the digests of all that was read, None if nix would look some of it up afresh."""
        if not self._nix.pure:
            return None
        lock_file = Path(source) / _parameters(self._url).get("dir", "") / "flake.lock"
        overrides = {tuple(name.split("/")): url for name, url in self.overrides}
        try:
            if not self._graphs or self._graphs[0][0] != before:
                self._graphs = [(before, self._graph())]
            found = inputs.dependencies(self._graphs[0][1], lock_file, overrides)
        except (NixFailure, KeyError, TypeError, AttributeError):
            return None  # a graph of an unknown form: evaluate each time
        if found.unsettled:
            return None
        more = memory.digests(found.local - before.keys())
        now = memory.digests([*before, *more])
        # What changed while nix was reading belongs to no digest.
        if now != {**before, **more}:
            return None
        trees = {url: digest for url, digest in now.items() if digest is not None}
        return trees if len(trees) == len(now) else None

    def _graph(self) -> dict[str, Any]:
        """Return the inputs as nix has locked them: `locks` of `nix flake metadata`."""
        answer = self._nix.metadata(
            _WRAPPER, overrides=self._overridden("target/"), timeout=self._timeout
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
            has = f"Its inputs are: {listed(names)}." if names else "It has no inputs."
            raise FlakeError(
                f"--nixvm-override-input {found[1]}: {self.what} has no such input"
                f"{near(found[1], names)} {has}"
            )

    def _overridden(self, prefix: str) -> list[tuple[str, str]]:
        return [("target", self._url), *((prefix + name, url) for name, url in self.overrides)]

    def _resolve(self) -> str:
        """Ask what a remote reference means today: evaluations are remembered by that."""
        step = self._progress.step(f"Looking up {self.reference.url}")
        try:
            answer = self._nix.metadata(
                self._url, overrides=self.overrides, timeout=self._timeout, watch=step.update
            )
        except BaseException as error:
            step.fail("failed" if isinstance(error, NixFailure) else "")
            if isinstance(error, NixFailure):
                raise explain.evaluation_failed(error, self.subject(None)) from None
            raise
        step.finish()
        return str(answer.value.get("lockedUrl") or answer.value["url"])


def _with_source(expression: str) -> str:
    return f"{{ inherit (this) source; answer = {expression}; }}"


def _parameters(url: str) -> dict[str, str]:
    return dict(parse_qsl(url.partition("?")[2]))


def _need_git() -> None:
    if shutil.which("git") is None:
        raise MissingProgramError(
            "git was not found in PATH; nix needs it to read a flake in a git repository. Install "
            "it, or name the directory as path:DIR, which nix reads without git."
        )
