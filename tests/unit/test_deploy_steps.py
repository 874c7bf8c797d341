"""A deploy as seen from here, to a host that is made of directories and small programs."""

import shutil
import threading
import time

import pytest
from _deploy_host import PROGRAMS
from _deploy_host import Host as FakeHost

from pytest_nixvm.deploy.host import DeployError, Facts, Host, Target, check
from pytest_nixvm.deploy.result import told
from pytest_nixvm.deploy.steps import Deploy, Plan
from pytest_nixvm.deploy.system import difference, missing
from pytest_nixvm.errors import SettingsError, SshError
from pytest_nixvm.progress import Silent

pytestmark = pytest.mark.shell


@pytest.mark.parametrize(
    ("text", "login", "port"),
    [
        ("ssh://root@host", "root@host", None),
        ("ssh://host:2222", "root@host", 2222),
        ("ssh://me@Server.example.org/", "me@Server.example.org", None),
        ("ssh://root@[fe80::1]:22", "root@fe80::1", 22),
    ],
)
def test_host_is_a_url(text, login, port):
    target = Target.parse(text)
    assert (target.login, target.port) == (login, port)


@pytest.mark.parametrize(
    "text",
    ["", "host", "root@host", "http://host", "ssh://", "ssh://root@host/x", "ssh://root@host:x",
     "ssh://-oProxyCommand=x", "ssh://-x@host", "ssh://a b", "ssh://root:word@host", "ssh://[::1"],
)  # fmt: skip
def test_what_is_no_host_is_said(text):
    with pytest.raises(SettingsError, match="should be ssh://root@HOST"):
        Target.parse(text)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    fake = FakeHost(tmp_path / "host")
    for name in ("R", "NIXVM_DEPLOY_ROOT", "PATH"):
        monkeypatch.setenv(name, fake.env[name])
    yield fake
    fake.stop()


@pytest.fixture
def host(fake):
    host = Host(Target.parse("ssh://root@host:2222"), script=f"{fake.root}/run/nixvm-deploy.sh")
    host.upload()
    return host


def test_what_the_store_of_the_host_lacks_is_asked_for(fake, host):
    sizes = {f"/nix/store/{number}-of-many": number for number in range(12000)}
    assert missing(host, sizes) == {}
    fake.behave("lacks", "/11999-")
    assert missing(host, sizes) == {"/nix/store/11999-of-many": 11999}
    fake.program(fake.root / "bin" / "nix-store", "echo no such store >&2; exit 1")
    with pytest.raises(DeployError, match="missing failed: no such store"):
        missing(host, sizes)


def deploy(host, fake, copy=lambda: None, **changes):
    plan = Plan("server", fake.new, **{"timeout": 3.0, "switch_timeout": 20.0, **changes})
    made = Deploy(host, plan, Silent(), pause=0.1)
    return made.run(host.facts("preflight"), copy)


def test_host_that_is_well_keeps_the_new_system(host, fake):
    copied = []
    result = deploy(host, fake, lambda: copied.append(fake.rooted), checks=("true",))
    assert result.ok
    assert copied == [["nixvm-deploy"]]  # before it arrives
    assert fake.runs() == ("new", "new", "new")
    assert "generation 2, also after a reboot" in told(result)
    assert "nixos-rebuild switch --rollback" in told(result)
    assert deploy(host, fake).outcome == "unchanged"


def test_every_look_is_a_connection_of_its_own(host, fake):
    deploy(host, fake)
    calls = (fake.root / "ssh").read_text().splitlines()
    assert len(calls) > 4
    assert all("ControlPath=none" in call and "BatchMode=yes" in call for call in calls)


def test_option_of_the_users_goes_before_ours(fake):
    target = Target.parse("ssh://root@host")
    host = Host(target, ["ConnectTimeout=60", "ServerAliveInterval=30"], script=f"{fake.root}/s")
    host.upload()
    words = (fake.root / "ssh").read_text().split()
    for first, then in (
        ("ConnectTimeout=60", "ConnectTimeout=10"),
        ("ServerAliveInterval=30", "ServerAliveInterval=5"),
    ):
        assert words.index(first) < words.index(then)


def test_host_whose_key_is_not_known_is_told_how_it_gets_known(host, fake):
    fake.program(fake.root / "bin/ssh", "echo 'Host key verification failed.' >&2; exit 255")
    with pytest.raises(SshError, match=r"Log in once by hand.*: ssh ssh://root@host:2222"):
        host.facts()


def test_host_that_does_not_come_back_goes_back(host, fake, monkeypatch):
    monkeypatch.setattr("pytest_nixvm.deploy.steps.MARGIN", 10.0)
    fake.behave("new.test", 'touch "$R/unreachable"')
    fake.behave("old.test", 'rm "$R/unreachable"')
    result = deploy(host, fake, timeout=1.0)
    assert result.outcome == "rolled-back"
    assert fake.runs() == ("old", "old", "old")
    assert "has not answered for 1 s" in told(result)


@pytest.mark.parametrize(
    ("command", "reason"), [("echo no >&2; exit 7", "ended with 7: no"), ("false", "with 1")]
)
def test_check_that_fails_to_the_end_sends_it_back(host, fake, command, reason):
    result = deploy(host, fake, timeout=1.0, checks=("true", command))
    assert result.outcome == "rolled-back"
    assert reason in result.reason
    assert fake.runs() == ("old", "old", "old")


def test_check_may_end_as_ssh_itself_does(host, fake):
    result = deploy(host, fake, timeout=1.0, checks=('echo "it\'s no" >&2; exit 255',))
    assert result.reason.endswith("ended with 254: it's no")


def test_check_that_hangs_is_told_as_that(host, fake, monkeypatch):
    monkeypatch.setattr("pytest_nixvm.deploy.steps._CHECK_TIMEOUT", 0.5)
    result = deploy(host, fake, timeout=1.0, checks=("sleep 5",))
    assert result.reason == "the check 'sleep 5' did not end within 0.5 s"


def test_check_may_need_a_moment(host, fake, monkeypatch):
    monkeypatch.setattr("pytest_nixvm.deploy.steps._CALM", 0.2)
    command = f"test -e {fake.root}/ready || {{ touch {fake.root}/ready; exit 1; }}"
    assert deploy(host, fake, timeout=30.0, checks=(command,)).ok


def test_unit_that_fails_later_sends_it_back(host, fake, monkeypatch):
    monkeypatch.setattr("pytest_nixvm.deploy.steps._UNIT_GRACE", 0.0)
    fake.behave("failed", "a.service\n")
    command = f"printf '%s\\n' a.service b.service > {fake.root}/failed; exit 1"
    result = deploy(host, fake, timeout=30.0, checks=(command,))
    assert (result.outcome, result.reason) == ("rolled-back", "units failed: b.service")


def test_unit_that_fails_just_after_its_start_sends_it_back(host, fake, monkeypatch):
    monkeypatch.setattr("pytest_nixvm.deploy.steps._UNIT_GRACE", 0.0)
    command = f"echo x >> {fake.root}/checked; echo b.service > {fake.root}/failed"
    result = deploy(host, fake, timeout=30.0, checks=(command,))
    assert (result.outcome, result.reason) == ("rolled-back", "units failed: b.service")
    assert (fake.root / "checked").read_text() == "x\n"  # once is enough where it succeeds


def test_host_has_to_stay_well_though_its_check_outlives_the_timeout(host, fake):
    command = f"sleep 1.5; echo b.service > {fake.root}/failed"
    result = deploy(host, fake, timeout=1.0, checks=(command,))
    assert (result.outcome, result.reason) == ("rolled-back", "units failed: b.service")


def test_activation_that_fails_is_told_with_what_it_said(host, fake):
    fake.behave("new.test", "echo it is broken >&2; exit 2")
    result = deploy(host, fake)
    assert result.outcome == "rolled-back"
    assert "it is broken" in told(result)
    assert "exit status 2" in told(result)


def test_system_that_must_be_booted_is_said(host, fake):
    fake.behave("new.test", "exit 100")
    assert "nixvm deploy --boot" in told(deploy(host, fake))
    result = deploy(host, fake, boot=True)
    assert fake.runs() == ("old", "new", "new")
    assert "boots server, generation 2 from its next boot on" in told(result)


def test_interrupted_it_goes_back_at_once(host, fake):
    made = Deploy(host, Plan("server", fake.new, timeout=60.0), Silent(), pause=0.1)

    def interrupted():
        raise KeyboardInterrupt

    made._well = interrupted
    result = made.run(host.facts("preflight"), lambda: None)
    assert (result.outcome, result.interrupted) == ("rolled-back", True)
    assert fake.runs() == ("old", "old", "old")


def deployed_before(fake):
    """Leave what a deploy of yesterday leaves."""
    fake.start(deploy="yesterday")
    fake.until("waiting")
    fake.call("confirm", fake.new, "yesterday")
    assert fake.ended() == "committed"
    (fake.root / "ended").unlink()
    for link, to in (("run/current-system", fake.old), ("nix/var/nix/profiles/system", fake.old)):
        (fake.root / link).unlink()
        (fake.root / link).symlink_to(to)


def test_interrupted_before_it_began_it_is_not_taken_for_the_one_before(host, fake):
    deployed_before(fake)
    made = Deploy(host, Plan("server", fake.new), Silent(), pause=0.1)

    def interrupted():
        raise KeyboardInterrupt

    made._start = interrupted
    result = made.run(host.facts("preflight"), lambda: None)
    assert (result.outcome, result.output) == ("rolled-back", "")
    assert fake.rooted == []
    assert fake.start(deploy=made._id).returncode == 3  # what was under way comes too late


def test_line_that_is_lost_while_it_starts_sends_it_back(host, fake):
    ssh = fake.root / "bin/ssh"
    lost = 'case $* in *" start "*) lost=1 ;; esac\n'
    fake.program(
        ssh,
        PROGRAMS["ssh"].replace("exec bash", f"{lost}bash")
        + '[ -z "${lost-}" ] || { echo "Connection reset by peer" >&2; exit 255; }\n',
    )
    result = deploy(host, fake, timeout=30.0)
    assert result.outcome == "rolled-back"
    assert "Connection reset by peer" in told(result)
    assert fake.ended() == "rolled-back"
    assert fake.runs() == ("old", "old", "old")


def test_interrupted_twice_it_says_what_the_host_does(host, fake):
    made = Deploy(host, Plan("server", fake.new), Silent(), pause=0.1)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    made._well = made._end = interrupted
    result = made.run(host.facts("preflight"), lambda: None)
    assert (result.outcome, result.interrupted) == ("unknown", True)
    assert f"goes back to {fake.old} by itself unless" in told(result)


def test_host_that_was_restarted_after_it_was_confirmed_keeps_it(host, fake):
    made = Deploy(host, Plan("server", fake.new), Silent(), pause=0.1)

    def restarted():
        host.call("confirm", fake.new, made._id)
        assert fake.ended() == "committed"
        (fake.root / "nix/var/nix/gcroots/nixvm-deploy").symlink_to(fake.new)  # as a reset has it
        shutil.rmtree(fake.root / "run/nixvm-deploy")
        (fake.root / "run/nixvm-deploy.sh").unlink()

    made._confirm = restarted
    assert made.run(host.facts("preflight"), lambda: None).outcome == "committed"
    assert fake.rooted == []


def test_host_that_was_restarted_before_it_could_confirm_is_told_with_what_it_booted(host, fake):
    """Its boot default was another system than ran: a test of somebody's."""
    tried = fake.root / "nix/store/tried"
    shutil.copytree(fake.new, tried)
    (fake.root / "run/tried").symlink_to(tried)
    (fake.root / "run/tried").rename(fake.root / "run/current-system")
    made = Deploy(host, Plan("server", fake.new), Silent(), pause=0.1)

    def restarted():
        fake.behave("stopping", "")
        fake.kill()
        fake.ended()
        for name in ("nixvm-deploy", "nixvm-deploy-old"):
            (fake.root / "nix/var/nix/gcroots" / name).symlink_to(fake.new)  # as a reset has it
        shutil.rmtree(fake.root / "run/nixvm-deploy")
        (fake.root / "run/nixvm-deploy.sh").unlink()
        (fake.root / "run/booted").symlink_to(fake.old)
        (fake.root / "run/booted").rename(fake.root / "run/current-system")

    made._confirm = restarted
    result = made.run(host.facts("preflight"), lambda: None)
    assert (result.outcome, result.reason) == ("rolled-back", "it was restarted")
    assert f"It runs {fake.old}, its boot default." in told(result)
    assert fake.rooted == []


def test_systemd_that_does_not_answer_is_not_well(host, fake):
    fake.behave("new.test", 'touch "$R/silent"')
    result = deploy(host, fake, timeout=1.0)
    assert (result.outcome, result.reason) == ("rolled-back", "systemd does not answer")


def test_host_that_boots_something_else_is_said(host, fake):
    fake.behave("new.boot", "exit 1")
    fake.behave("old.boot", "exit 1")
    said = told(deploy(host, fake))
    assert "the boot loader could not be installed" in said
    assert "What it boots could not be put back" in said


def test_who_is_not_root_is_told_to_be(host, fake):
    fake.behave("uid", "1000\n")
    with pytest.raises(DeployError, match=r"switched by root\. Name it: ssh://root@host"):
        host.upload()


def test_copy_that_fails_changes_nothing(host, fake):
    def copy():
        raise DeployError("no room")

    with pytest.raises(DeployError, match="no room"):
        deploy(host, fake, copy)
    assert fake.runs() == ("old", "old", "old")
    assert fake.rooted == []


def test_host_that_was_restarted_meanwhile_is_said_to_run_the_old_one(host, fake):
    """What boots is the old generation, and /run is empty."""

    def restart():
        fake.until("waiting")
        fake.behave("stopping", "")
        fake.kill()
        fake.ended()
        shutil.rmtree(fake.root / "run/nixvm-deploy")
        (fake.root / "run/nixvm-deploy.sh").unlink()
        (fake.root / "run/current-system").unlink()
        (fake.root / "run/current-system").symlink_to(fake.old)

    thread = threading.Thread(target=restart)
    thread.start()
    result = deploy(host, fake, timeout=5.0, checks=("false",))
    thread.join()
    assert result.outcome == "rolled-back"


def test_second_deploy_is_an_error_of_its_own(host, fake):
    fake.start()
    fake.until("waiting")
    with pytest.raises(DeployError, match="another deploy is under way"):
        check(host.facts("preflight"), host.target, "x86_64")
    with pytest.raises(DeployError, match="under way"):
        deploy(host, fake)
    assert fake.state() == "waiting"


def test_host_that_cannot_be_reached_is_told_in_the_words_of_ssh(host, fake):
    fake.behave("unreachable", "")
    began = time.monotonic()
    with pytest.raises(SshError, match="Connection timed out"):
        host.facts("preflight")
    assert time.monotonic() - began < 10


GOOD = {
    "nixos": "yes", "systemd": "yes", "nix": "yes", "current": "/nix/store/x",
    "profile": "/nix/store/x", "machine": "x86_64",
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"nixos": ""}, "is no NixOS"),
        ({"systemd": ""}, "no systemd-run"),
        ({"nix": ""}, "has no nix"),
        ({"busy": "yes"}, "another deploy"),
        ({"profile": ""}, "no generation to go back to"),
        ({"machine": "aarch64"}, "is aarch64, the system is for x86_64"),
    ],
)
def test_host_that_is_not_fit_is_said(change, said):
    target = Target.parse("ssh://host")
    check(Facts(GOOD, ()), target, "x86_64")
    with pytest.raises(DeployError, match=said):
        check(Facts({**GOOD, **change}, ()), target, "x86_64")


def test_difference_of_two_closures():
    def path(digest, name):
        return f"/nix/store/{digest * 32}-{name}"

    old = [path("1", "a-1.0"), path("1", "b-2"), path("1", "etc"), path("1", "gone-3.1-lib")]
    new = [path("2", "a-1.1"), path("1", "b-2"), path("2", "etc"), path("1", "more-4")]
    assert difference(old, new) == ["~ a 1.0 → 1.1", "~ etc, rebuilt", "- gone 3.1", "+ more 4"]
