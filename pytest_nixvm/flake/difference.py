"""What differs between the deployed generation and the candidate, as far as the store tells.

Read on the host, from two toplevels that are built: no VM is asked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from pytest_nixvm.errors import ChangeError
from pytest_nixvm.flake.contents import Store
from pytest_nixvm.flake.difference_text import render
from pytest_nixvm.flake.etc_files import (
    Names,
    compare_activation,
    compare_etc,
    compare_specialisations,
)
from pytest_nixvm.flake.nix import Nix
from pytest_nixvm.flake.packages import (
    PackageChange,
    PackageDifference,
    compare_closures,
    read_closure,
    split_name,
)
from pytest_nixvm.flake.units import UnitChange, UnitDifference, compare_units

__all__ = [
    "BeforeAfter",
    "Difference",
    "Names",
    "Options",
    "PackageChange",
    "PackageDifference",
    "UnitChange",
    "UnitDifference",
    "difference",
]

# Called for the options of both: the deployed generation's, the candidate's.
Options = Callable[[], tuple[Mapping[str, str], Mapping[str, str]]]


@dataclass(frozen=True)
class BeforeAfter:
    """Something that both have and that is not the same, as a person knows it.

    Both texts may be equal: the same version, built anew.
    """

    before: str
    after: str


@dataclass(frozen=True)
class Difference:
    """From `base`, the deployed generation's toplevel, to `candidate`'s.

    What is None does not differ. `activation` are the parts of the activation script that do
    something else (`users (users-groups.json)`), `etc` the files of /etc without system units.
    """

    base: Path
    candidate: Path
    packages: PackageDifference
    units: UnitDifference
    etc: Names = field(default_factory=Names)
    specialisations: Names = field(default_factory=Names)
    activation: tuple[str, ...] = ()
    release: BeforeAfter | None = None  # NixOS's own version, its label
    kernel: BeforeAfter | None = None
    kernel_params: BeforeAfter | None = None
    initrd: BeforeAfter | None = None
    init: BeforeAfter | None = None  # the init interface's version: a switch asks for a reboot
    systemd: BeforeAfter | None = None  # a switch executes it again
    ask_options: Options | None = field(default=None, repr=False, compare=False)

    @property
    def is_empty(self) -> bool:
        """Whether both are one and the same system."""
        return self.base == self.candidate

    @property
    def size_before(self) -> int:
        """Bytes of the deployed generation's closure."""
        return self.packages.size_before

    @property
    def size_after(self) -> int:
        """Bytes of the candidate's closure."""
        return self.packages.size_after

    @property
    def needs_reboot(self) -> tuple[str, ...]:
        """What does not take effect before a reboot: kernel, kernel parameters, initrd, init."""
        parts = {
            "kernel": self.kernel,
            "kernel parameters": self.kernel_params,
            "initrd": self.initrd,
            "init": self.init,
        }
        return tuple(name for name, value in parts.items() if value)

    @cached_property
    def options(self) -> Mapping[str, tuple[str | None, str | None]]:
        """Options of the configuration's own modules that differ: before, after, as Nix writes it.

        None where one of them does not set it. Evaluates both configurations, which takes seconds
        for a real machine; {} where that can't be had.

        Raises:
            EvaluationError: Nix can't evaluate one of them.
        """
        if self.ask_options is None:
            return {}
        before, after = self.ask_options()
        return {
            name: (before.get(name), after.get(name))
            for name in sorted(before.keys() | after.keys())
            if before.get(name) != after.get(name)
        }

    def unit_diff(self, name: str) -> str:
        """Return how a unit's text differs, and that of the scripts and files it names.

        A unified difference, without the hashes of store paths; "" if there is none.
        """
        return self.units.diff(name)

    def text(self, *, options: bool = False, rows: int | None = 30) -> str:
        """Return it for a person; with `options` those are asked for and told as well.

        No list is longer than `rows` lines, None for all of them.
        """
        return render(self, options=options, rows=rows)

    def to_json(self, *, options: bool = False) -> dict[str, object]:
        """Return it as plain data, for `json.dumps`."""

        def pair(value: BeforeAfter | None) -> dict[str, str] | None:
            return dataclasses.asdict(value) if value else None

        packages, units = self.packages, self.units
        data: dict[str, object] = {
            "base": str(self.base),
            "candidate": str(self.candidate),
            "size": {"before": self.size_before, "after": self.size_after},
            "release": pair(self.release),
            "needs_reboot": list(self.needs_reboot),
            "kernel": pair(self.kernel),
            "kernel_params": pair(self.kernel_params),
            "initrd": pair(self.initrd),
            "init": pair(self.init),
            "systemd": pair(self.systemd),
            "packages": [
                {"kind": change.kind, **dataclasses.asdict(change)} for change in packages.changes
            ],
            "rebuilt": packages.rebuilt,
            "units": {
                "added": units.added,
                "removed": units.removed,
                "changed": [dataclasses.asdict(change) for change in units.changed],
            },
            "etc": dataclasses.asdict(self.etc),
            "specialisations": dataclasses.asdict(self.specialisations),
            "activation": self.activation,
        }
        if options:
            data["options"] = {name: list(values) for name, values in self.options.items()}
        return data


def difference(
    nix: Nix, base: Path, candidate: Path, *, options: Options | None = None
) -> Difference:
    """Compare two toplevels that are in the store (links to them are followed).

    `options` is called when `Difference.options` is asked for.

    Raises:
        ChangeError: one of them is not there, or is no NixOS system.
        FlakeError: nix can't tell what they are made of.
    """
    base, candidate = (_toplevel(path) for path in (base, candidate))
    store = Store.of(candidate)
    before, after = read_closure(nix, base), read_closure(nix, candidate)
    chosen: list[str] = []
    for toplevel, closure in ((base, before), (candidate, after)):
        path = store.look(toplevel / "sw")
        chosen += closure.references.get(str(path.path), ()) if path else ()
    return Difference(
        base,
        candidate,
        compare_closures(before, after, chosen),
        compare_units(store, base, candidate),
        compare_etc(store, base, candidate),
        compare_specialisations(store, base, candidate),
        compare_activation(store, base, candidate),
        release=_words(store, base, candidate, "nixos-version"),
        kernel=_part(store, base, candidate, "kernel"),
        kernel_params=_words(store, base, candidate, "kernel-params"),
        initrd=_part(store, base, candidate, "initrd"),
        init=_words(store, base, candidate, "init-interface-version"),
        systemd=_part(store, base, candidate, "systemd"),
        ask_options=options,
    )


def _toplevel(path: Path) -> Path:
    try:
        real = path.resolve(strict=True)
    except OSError:
        raise ChangeError(f"{path} is not in the Nix store any more; build it again.") from None
    if not (real / "activate").exists():
        raise ChangeError(f"{path} is no NixOS system: it has no activation script.")
    return real


def _words(store: Store, base: Path, candidate: Path, name: str) -> BeforeAfter | None:
    """Compare files of few words; whether they end in a line break does not matter."""
    before, after = ((store.text(side / name) or "").strip() for side in (base, candidate))
    return BeforeAfter(before, after) if before != after else None


def _part(store: Store, base: Path, candidate: Path, name: str) -> BeforeAfter | None:
    """Compare links into the store: what is behind a file, and for a directory the path alone."""
    one, other = store.look(base / name), store.look(candidate / name)
    directories = one and other and one.kind == other.kind == "directory"
    if one == other or (not directories and store.same(base / name, candidate / name)):
        return None
    return BeforeAfter(_version(store, base / name), _version(store, candidate / name))


def _version(store: Store, path: Path) -> str:
    """What to call it: a kernel by its modules' version, others by their store path's."""
    entry = store.look(path)
    if entry is None:
        return "none"
    if entry.kind == "link":
        return entry.target
    if path.name == "kernel":
        modules = store.children(path.with_name("kernel-modules") / "lib/modules")
        if len(modules) == 1:
            return modules[0].name
    name = store.name(str(entry.path))
    return split_name(name)[1] or name
