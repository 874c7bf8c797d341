"""SSH, serial console, agent and QMP of one machine."""

from __future__ import annotations

import pytest

from pytest_nixvm.errors import AgentError, QmpError, SerialError, WaitTimeoutError

pytestmark = pytest.mark.nixvm("test-vm")


def test_ssh_keeps_streams_and_status_apart(ssh):
    result = ssh.run("echo out; echo err >&2; exit 3")

    assert (result.stdout, result.stderr, result.returncode) == ("out\n", "err\n", 3)
    assert ssh.run(["printf", "%s", "a  b'\""]).stdout == "a  b'\""


def test_ssh_is_a_paramiko_client(ssh):
    _, stdout, _ = ssh.client.exec_command("id -un", timeout=30)

    assert stdout.read() == b"root\n"


def test_ssh_port_is_on_loopback_only(ssh):
    assert ssh.host == "127.0.0.1"
    assert ssh.port > 1024


def test_ssh_copies_files(ssh, tmp_path):
    source = tmp_path / "source"
    source.write_bytes(bytes(range(256)) * 4096)

    ssh.put(source, "/tmp/copied")
    ssh.get("/tmp/copied", tmp_path / "back")

    assert (tmp_path / "back").read_bytes() == source.read_bytes()


def test_megabytes_on_both_streams(ssh):
    result = ssh.run("head -c 8M /dev/zero & head -c 8M /dev/zero >&2; wait", timeout=120)

    assert (len(result.stdout_bytes), len(result.stderr_bytes)) == (8 * 2**20, 8 * 2**20)


@pytest.mark.nixvm("test-vm", user="alice")
def test_ssh_as_the_marker_s_user(ssh):
    assert ssh.run("id -un").stdout == "alice\n"


def test_serial_login_and_commands(serial):
    serial.login("alice", "opensesame")

    try:
        assert serial.run("id -un").stdout == "alice\n"
        result = serial.run("echo $((6 * 7)); exit_with() { return 3; }; exit_with")
        assert (result.stdout, result.returncode) == ("42\n", 3)
    finally:
        serial.logout()


def test_serial_refuses_a_wrong_password(serial):
    with pytest.raises(SerialError, match=r"(?i)incorrect|refused"):
        serial.login("alice", "letmein")


def test_serial_waits_for_what_was_said_and_for_what_will_be(serial, vm):
    serial.wait_for(r"login: ", timeout=60)
    vm.succeed("(sleep 1; echo hear hear > /dev/ttyS0) >/dev/null 2>&1 &")
    serial.wait_for(r"hear hear", timeout=60)
    with pytest.raises(WaitTimeoutError, match="never said"):
        serial.wait_for(r"never said", timeout=0.5)


def test_the_console_log_begins_at_power_on(serial):
    assert "SeaBIOS" in serial.log.read_text(errors="replace")


def test_serial_is_a_pexpect_object(serial, vm):
    spawn = serial.spawn
    vm.succeed("echo knock knock > /dev/ttyS0")

    assert spawn.expect(["nobody", "knock knock"], timeout=60) == 1


def test_agent_files(agent):
    data = bytes(range(256)) * 1000
    agent.write_file("/tmp/by-agent", data)

    assert agent.read_file("/tmp/by-agent") == data
    with pytest.raises(AgentError, match="no-such-file"):
        agent.read_file("/no-such-file")


def test_agent_exec_and_info(agent):
    agent.ping()
    assert agent.exec(["uname", "-s"], timeout=30).stdout == "Linux\n"
    assert agent.info().version


def test_agent_sets_the_time(agent, vm):
    agent.set_time(1_000_000_000)
    assert 1_000_000_000 <= int(vm.succeed("date +%s")) < 1_000_000_300
    agent.set_time(None)


def test_qmp_commands_events_and_errors(qmp):
    assert qmp.execute("query-status")["status"] == "running"
    mark = qmp.mark()
    qmp.execute("stop")
    qmp.wait_event("STOP", timeout=10, since=mark)
    qmp.execute("cont")
    qmp.wait_event("RESUME", timeout=10, since=mark)
    with pytest.raises(QmpError) as caught:
        qmp.execute("no-such-command")
    assert caught.value.error_class == "CommandNotFound"


def test_a_port_of_the_guest_is_forwarded(vm):
    assert vm.port(22) == vm.port(22)
