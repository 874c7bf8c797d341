"""The ways in: the machine boots, its agent answers, its sshd lets in whom it should."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_nixvm.checks.base import Checked, DoesNotApply, finding
from pytest_nixvm.errors import ChannelError, SshError

if TYPE_CHECKING:
    from pytest_nixvm.guest.ssh import Ssh


def boots(checked: Checked) -> None:
    """The machine boots: the kernel finds its root, systemd comes up and has no job left."""
    # A machine that does not boot raises here, with its console.
    report = checked.vm.boots[-1] if checked.vm.boots else None
    if report is not None and report.state not in ("running", "degraded"):
        raise finding(
            f"{checked.name} has booted into the state {report.state!r}, not into a system that "
            "is running.",
            checked.vm.console.tail(15),
            todo="The default target (boot.kernelParams, systemd.defaultUnit) decides that.",
        )


def agent(checked: Checked) -> None:
    """The QEMU guest agent answers and runs commands (the VM turns it on if it is not)."""
    try:
        checked.vm.agent.ping(timeout=30)
        done = checked.vm.agent.exec(["/bin/sh", "-c", "echo nixvm"], timeout=60)
    except ChannelError as error:
        raise finding(
            f"The guest agent of {checked.name} does not answer any more.",
            str(error),
            todo="qemu-guest-agent.service runs it (services.qemuGuest.enable).",
        ) from error
    if done.stdout.strip() != "nixvm":
        raise finding(
            f"The guest agent of {checked.name} runs no commands.",
            f"exit status {done.returncode}",
            done.stderr,
            todo="Does the configuration of services.qemuGuest, or a wrapper, block guest-exec?",
        )


def ssh(checked: Checked) -> None:
    """Where sshd is enabled, whoever may log in with a key can, through the firewall."""
    declared = checked.declared
    if declared.ssh is None:
        raise DoesNotApply(f"{checked.name} has no sshd (services.openssh.enable).")
    vm = checked.vm
    if not any(declared.firewall.opens(port, declared.interface) for port in declared.ssh.ports):
        for port in declared.ssh.ports:
            vm.wait_for_open_port(port, timeout=30)
        checked.warn(
            f"sshd of {checked.name} listens, but its configuration does not open it to the "
            "outside, so no log-in was tried"
        )
        return
    try:
        connection: Ssh = vm.ssh
    except SshError as error:
        raise finding(
            f"Nobody can log in to {checked.name} by SSH with a key.",
            str(error),
            todo="services.openssh.settings and users.users decide who may. If passwords alone "
            "are meant, turn this check off.",
        ) from error
    try:
        done = connection.run(["true"], timeout=60)
    except SshError as error:
        raise finding(
            f"{checked.name} can't be reached by SSH as {connection.user}.",
            str(error),
            todo="sshd listens on services.openssh.ports, and services.openssh.openFirewall lets "
            "it through the firewall.",
        ) from error
    if not done.ok:
        raise finding(
            f"{connection.user} can log in to {checked.name}, but run nothing.",
            f"`true` ended with exit status {done.returncode}",
            done.stderr,
            todo=f"users.users.{connection.user}.shell, or sshd's ForceCommand, decide that.",
        )
