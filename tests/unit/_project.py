"""A user's directory for pytester: a flake in git, tests, an ini file; and pytest run there.

Real nix, tiny flakes, no VM: a test here ends before one would be started.
"""

from __future__ import annotations

import pytest
from _flake import FLAKE, OPTIONS, git, machine, write_flake

# What nixpkgs' qemu-vm.nix declares for what is in a VM's store besides its system.
CARRIES = "{ virtualisation.vmVariant.virtualisation.additionalPaths = [ ]; }"


def host(name: str, version: str = "1", more: str = "") -> str:
    """Return a machine; what has another `version` is another system."""
    return machine(name, f"{name}-host", f'{CARRIES} {{ test.build = "# {version}"; }} {more}')


class Project:
    """A directory with a flake in `config`, whose commits are given as lists of machines."""

    def __init__(self, pytester: pytest.Pytester, *words: str) -> None:
        self.pytester = pytester
        self.directory = pytester.path
        self.words = words
        self.repository = self.directory / "config"
        (self.directory / "pytest.ini").write_text("[pytest]\naddopts = --strict-markers -rs\n")

    def commit(self, *machines: str) -> str:
        """Commit a flake with these machines, and return the commit's name."""
        if not self.repository.exists():
            write_flake(self.repository, "".join(machines))
        else:
            self.edit(*machines)
            git(self.repository, "commit", "-q", "--allow-empty", "-a", "-m", "next")
        return git(self.repository, "rev-parse", "HEAD")

    def edit(self, *machines: str) -> None:
        """Write a flake with these machines, and commit nothing."""
        (self.repository / "flake.nix").write_text(FLAKE.format(body="".join(machines)))

    def write(self, text: str, name: str = "test_it.py") -> None:
        (self.directory / name).write_text(text)

    def ini(self, *lines: str) -> None:
        with (self.directory / "pytest.ini").open("a") as file:
            file.writelines(f"{line}\n" for line in lines)

    def run(
        self, *words: str, flake: str | None = "config", apart: bool = False
    ) -> pytest.RunResult:
        """Run pytest; `apart` is a process of its own, which xdist needs."""
        command = ["-p", "no:cacheprovider", "--nixvm-cache=cache", "--nixvm-accel=tcg"]
        if flake is not None:
            command.append(f"--nixvm-flake={flake}")
        for name, value in OPTIONS:
            command += ["--nixvm-nix-option", name, value]
        command += [*self.words, *words]
        if apart:
            return self.pytester.runpytest_subprocess(*command, timeout=120)
        return self.pytester.runpytest_inprocess(*command)

    def collected(self, *words: str, flake: str = "config") -> list[str]:
        """Return what is collected: of a test its name, of a check its node id."""
        done = self.run("--collect-only", "-q", *words, flake=flake)
        assert done.ret in (0, 5), said(done)
        lines = [line for line in done.outlines if "::" in line and not line.startswith("nixvm:")]
        checks = [line for line in done.outlines if line.startswith("nixvm::")]
        return [line.partition("::")[2] for line in lines] + checks

    def mistake(self, *words: str, flake: str | None = "config", apart: bool = False) -> str:
        """Run, expect a usage error of one message, and return that."""
        done = self.run(*words, flake=flake, apart=apart)
        output = said(done)
        assert done.ret == pytest.ExitCode.USAGE_ERROR, output
        assert "passed" not in output
        assert output.count("ERROR: ") == 1, output
        return output[output.index("ERROR: ") :]

    def skipped(self, *words: str, flake: str = "config") -> str:
        """Run, expect that everything is skipped and nothing booted, and return what is said."""
        done = self.run(*words, flake=flake)
        output = said(done)
        assert done.ret == 0, output
        assert set(done.parseoutcomes()) <= {"skipped", "deselected"}, output
        assert "Booting" not in output
        return output

    def built(self) -> list[str]:
        """Return the names of what was built: what is rooted in the cache."""
        return sorted(path.name for path in (self.directory / "cache" / "roots").glob("*"))


def said(done: pytest.RunResult) -> str:
    """Return all that a run has said, in which there is no traceback."""
    output = f"{done.stdout}\n{done.stderr}"
    assert "Traceback" not in output, output
    assert "INTERNALERROR" not in output, output
    assert "During handling of" not in output, output
    return output
