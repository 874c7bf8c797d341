"""Checks without test code: one run on a machine full of mistakes, and one that does not boot."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def verdicts(arguments_of, flake_copy, tmp_path_factory) -> str:
    """What the user sees who runs `pytest --nixvm-check` in a directory without tests."""
    place = tmp_path_factory.mktemp("checked")
    (place / "pytest.ini").write_text(
        "[pytest]\naddopts = --strict-markers -ra\n"
        "nixvm_check_off = faulty: agent: it is not asked here\n"
    )
    flake = flake_copy("checked")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "--nixvm-check", "--nixvm-memory=1024"),
            *(f"--nixvm-flake={flake}", "--nixvm-output=results"),
            "-p",
            "no:cacheprovider",
            *arguments_of(flake),
        ],
        cwd=place,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout + done.stderr
    return done.stdout


def section(output: str, item: str) -> str:
    """Return what a failed item's section says."""
    match = re.search(rf"(?ms)^_+ (?:ERROR at setup of )?{item} _+$(.*?)^(?:_{{5}}|={{5}})", output)
    assert match, output
    return match[1]


@pytest.mark.parametrize(
    ("check", "says"),
    [
        (
            "failed-units",
            ["broken.service", "no configuration", "phone-home.service", "not counted"],
        ),
        ("ports", ["tcp port 5555", "systemd of listen.socket", "no option opens it"]),
        ("log-in", ["bob's password is not a hash", "it was cut"]),
        (
            "ignored-configuration",
            [
                "web.service:",
                "Did you mean Restart?",
                "systemd.services.web.serviceConfig.Restrat",
                "There is no kernel module 'nosuchmodule'",
            ],
        ),
        ("restart-loops", ["restless.service", "no database"]),
        ("reboot", ["stubborn.service did not stop by itself"]),
    ],
)
def test_each_mistake_is_found_by_its_check(verdicts, check, says):
    text = section(verdicts, f"faulty::{check}")
    for words in says:
        assert words in text
    assert f"nixvm_check_off = faulty: {check}: WHY" in text
    assert "Traceback" not in text


def test_the_rest_passes_and_says_what_is_no_defect(verdicts):
    for check in ("boots", "ssh", "shutdown"):
        assert f"nixvm::faulty::{check} -" not in verdicts
    assert "nobody listens on tcp port 8443" in verdicts
    assert "carol has neither a password nor a key" in verdicts
    assert "faulty::agent is turned off: it is not asked here" in verdicts
    assert "faulty::home-manager: " in verdicts


def test_a_machine_that_does_not_boot_says_so_once(verdicts):
    assert "panic" in section(verdicts, "panics::boots")
    assert verdicts.count("FAILED nixvm::panics::") + verdicts.count("ERROR nixvm::panics::") == 1
    assert "panics::ports: not looked at, an earlier check has met this: " in verdicts
