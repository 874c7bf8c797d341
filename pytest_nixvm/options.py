"""The options as data: what the plugin registers on the command line and in the ini file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Isolation = Literal["test", "module", "session"]
Network = Literal["isolated", "nat"]
Keep = Literal["never", "failed", "always"]
Screenshot = Literal["off", "on", "only-on-failure"]

ISOLATIONS = ("test", "module", "session")
NETWORKS = ("isolated", "nat")
KEEPS = ("never", "failed", "always")
SCREENSHOTS = ("off", "on", "only-on-failure")
ACCELERATORS = ("auto", "kvm", "tcg")
DEFAULT_CACHE_SIZE = 20
"""GiB of templates; one is as large as what its guest has written to memory and disk."""
DEFAULT_BOOT_TIMEOUT = 300.0
"""Seconds from QEMU's start to a settled system; a large NixOS host under TCG needs minutes."""


@dataclass(frozen=True)
class Option:
    """An option as the user sees it. `values` is how many words it takes; 0 is a flag."""

    name: str
    metavar: str | tuple[str, ...]
    help: str
    values: int = 1
    repeat: bool = False

    @property
    def flag(self) -> str:
        """The command line's spelling."""
        return f"--nixvm-{self.name}"

    @property
    def ini(self) -> str:
        """The ini file's spelling, also where argparse keeps the value."""
        return "nixvm_" + self.name.replace("-", "_")


OPTIONS = (
    Option("flake", "REF[#ATTR]", "the flake whose machines are tested: ., a path, github:…"),
    Option("machine", "GLOB", "test only the machines whose name matches", repeat=True),
    Option(
        "override-input",
        ("NAME", "REF"),
        "use REF for the flake's input NAME, as nix does",
        values=2,
        repeat=True,
    ),
    Option(
        "nix-option",
        ("NAME", "VALUE"),
        "set a Nix option for every nix call",
        values=2,
        repeat=True,
    ),
    Option(
        "isolation",
        "|".join(ISOLATIONS),
        "how long tests share a VM; with test, each gets a pristine clone (default: test)",
    ),
    Option("accel", "|".join(ACCELERATORS), "how QEMU runs the guest (default: auto)"),
    Option("memory", "MIB", "the VMs' memory, instead of what they configure"),
    Option("cores", "N", "the VMs' processors, instead of what they configure"),
    Option(
        "boot-timeout",
        "SECONDS",
        f"from QEMU's start to settled units (default: {DEFAULT_BOOT_TIMEOUT:g})",
    ),
    Option(
        "network",
        "|".join(NETWORKS),
        "what a VM reaches: nothing, or everything that this machine reaches (default: isolated)",
    ),
    Option(
        "keep",
        "|".join(KEEPS),
        "leave VMs running after the session, and say how to get in and how to end them "
        "(default: never)",
    ),
    Option(
        "screenshot",
        "|".join(SCREENSHOTS),
        "when a test's machines are photographed (default: only-on-failure)",
    ),
    Option(
        "output",
        "DIR",
        "where a run leaves consoles, logs and a folder for each failed test "
        "(default: below the cache)",
    ),
    Option(
        "cache",
        "DIR",
        "where evaluations, results, templates and scratch disks live (default: per user)",
    ),
    Option(
        "cache-size",
        "GIB",
        f"the most that templates may take there (default: {DEFAULT_CACHE_SIZE}); the least "
        "recently used go first",
    ),
    Option(
        "from",
        "REF",
        "the deployed generation, for tests of the change to the flake as it is: HEAD~1, a branch, "
        "or a flake reference",
    ),
    Option(
        "check",
        "",
        "check every selected machine, without any test code: does it boot, …",
        values=0,
    ),
    Option(
        "check-off",
        "MACHINE: CHECK: REASON",
        "leave a check out, with a reason; MACHINE may be a glob",
        repeat=True,
    ),
    Option("changed", "REF", "only machines whose system differs from that revision of the flake"),
    Option(
        "fidelity", "", "say for each machine what differs from the real one, and why", values=0
    ),
    Option(
        "boot-loader",
        "",
        "boot through each machine's own boot loader, from a disk that has one",
        values=0,
    ),
    Option("offline", "", "let Nix download nothing", values=0),
)
