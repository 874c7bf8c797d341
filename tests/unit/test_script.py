"""Scripts of the NixOS test driver, as far as they need no VM; and that no verb is missing."""

from __future__ import annotations

import inspect
import re
import threading
from pathlib import Path

import pytest

from pytest_nixvm import script
from pytest_nixvm.errors import PollingConditionError, ScriptError, WaitTimeoutError
from pytest_nixvm.machine import Machine

ROOT = Path(__file__).parents[2]

DRIVER = """
block()
connect()
console_interact()
copy_from_host(source, target)
copy_from_host_via_shell(source, target)
copy_from_machine(source, target_dir)
copy_from_vm(source, target_dir)
crash()
dump_tty_contents(tty)
execute(command, check_return, check_output, timeout)
fail(commands, timeout)
forward_port(host_port, guest_port)
get_console_log()
get_screen_text()
get_screen_text_variants()
get_tty_text(tty)
get_unit_info(unit, user)
get_unit_property(unit, property, user)
get_window_names()
is_up()
log(msg)
nested(msg, attrs)
reboot()
release()
require_unit_state(unit, require_state)
screenshot(filename)
send_chars(chars, delay)
send_console(chars)
send_key(key, delay, log)
send_monitor_command(command)
shell_interact(address)
shutdown()
sleep(secs)
start(allow_reboot)
start_job(jobname, user)
stop_job(jobname, user)
succeed(commands, timeout)
switch_root()
systemctl(q, user)
unblock()
wait_for_closed_port(port, addr, timeout)
wait_for_console_text(regex, timeout)
wait_for_file(filename, timeout)
wait_for_open_port(port, addr, timeout)
wait_for_open_unix_socket(addr, is_datagram, timeout)
wait_for_qmp_event(event_filter, timeout)
wait_for_shutdown()
wait_for_text(regex, timeout)
wait_for_unit(unit, user, timeout)
wait_for_window(regexp, timeout)
wait_for_x(timeout)
wait_until_fails(command, timeout)
wait_until_succeeds(command, timeout)
wait_until_tty_matches(tty, regexp, timeout)
"""
"""The NixOS test driver's verbs of a machine, with the names of their parameters."""

VERBS = [line for line in DRIVER.splitlines() if line]


def run(text: str, machines: object = (), **options: str) -> None:
    script.run(text, script.makers(machines, pytest.fail), **options)


@pytest.mark.parametrize("signature", VERBS, ids=lambda text: text.partition("(")[0])
def test_every_verb_of_the_driver_is_there_with_its_parameters(signature):
    name, _, rest = signature.rstrip(")").partition("(")
    wanted = [each for each in rest.split(", ") if each]

    verb = getattr(Machine, name)

    given = list(inspect.signature(verb).parameters.values())[1:]
    assert [each.name for each in given[: len(wanted)]] == wanted
    for extra in given[len(wanted) :]:
        assert extra.default is not inspect.Parameter.empty, f"{extra} must be optional"


# --- the text --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "x = 1\nif x:\n    log.info('seen')",
        "\n        x = 1\n        if x:\n            log.info('seen')\n        ",
        "x = 1\n        if x:\n            log.info('seen')\n",
        "# a comment at the margin\n    x = 1\n    if x:\n        log.info('seen')\n",
    ],
    ids=["flush", "indented", "first line flush", "comment flush"],
)
def test_a_script_may_be_pasted_with_its_indentation(text, capsys):
    run(text)

    assert "seen" in capsys.readouterr().out


def test_a_syntax_error_is_one_message_with_its_line():
    with pytest.raises(ScriptError) as caught:
        run("\n    x = 1\n    machine.succeed('a'\n    y = 2\n")

    assert "line 3" in str(caught.value)
    assert "\n    machine.succeed('a'\n                   ^" in str(caught.value)
    assert caught.value.__suppress_context__


def test_nix_in_the_script_is_recognised():
    with pytest.raises(ScriptError, match=r"Nix's \$\{"):
        run("machine.succeed(${pkgs.hello}/bin/hello)")


def test_a_script_may_be_a_file(tmp_path, capsys):
    path = tmp_path / "script.py"
    path.write_text("log.info('from the file')\n")

    run(path)

    assert "from the file" in capsys.readouterr().out


def test_a_failure_shows_the_script_s_own_lines(pytester):
    pytester.makepyfile(
        '''
        from pytest_nixvm import script

        def test_it():
            script.run("""
                def deeper(number):
                    assert number == 42, "not the answer"

                with subtest("the question"):
                    deeper(41)
            """, [], "asked")
        '''
    )

    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")

    result.stdout.fnmatch_lines(
        [
            "<asked *>:6: in <module>",
            "*deeper(41)",
            ">*assert number == 42, *",
            "E*AssertionError: not the answer",
            "E*assert 41 == 42",
            "E*in subtest 'the question'",
            "<asked *>:3: AssertionError",
            "*subtest: the question*",
        ]
    )
    result.stdout.no_re_match_line(r".*pytest_nixvm/.*\.py:\d+")


# --- the names -------------------------------------------------------------------------------


def test_the_names_of_the_driver_are_there():
    run(
        """
        for name in '''start_all test_script machines vlans driver log os create_machine subtest
            run_tests join_all retry serial_stdout_off serial_stdout_on polling_condition Machine
            t debug'''.split():
            assert name in globals(), name
        assert machines == driver.machines == []
        t.assertEqual(os.sep, "/")
        serial_stdout_off()
        serial_stdout_on()
        debug.breakpoint()
        start_all()
        join_all()
        """
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("create_machine({})", "machines="),
        ("vlans[0]", "vm.block"),
        ("for vlan in vlans: pass", "vm.block"),
        ("vlans[0].nr", "vm.block"),
        ("run_tests()", "under way"),
        ("test_script()", "under way"),
        ("driver.out_dir", "NAME.out_dir"),
    ],
)
def test_what_is_not_there_says_so_when_it_is_touched(line, message):
    with pytest.raises(ScriptError, match=re.escape(message)):
        run(line)


def test_a_name_that_is_not_there_is_told_with_those_that_are():
    with pytest.raises(NameError) as caught:
        run("server.succeed('true')", {"web-1": _Vm(), "db": _Vm()})

    assert any("web-1, db" in note for note in caught.value.__notes__)


def test_machines_have_their_names_as_python_writes_them():
    web, db = _Vm("web-1"), _Vm("db")

    run("web_1.succeed('a'); db.succeed('b'); t.assertEqual(len(machines), 2)", [web, db])
    run("web_1.succeed('c'); machine.succeed('d')", [web])
    run("machine.succeed('e')", {"machine": web})

    assert web.calls == ["a", "c", "d", "e"]
    assert db.calls == ["b"]


def test_machines_that_a_script_can_not_tell_apart():
    with pytest.raises(ScriptError, match="'a-b' and 'a_b'"):
        run("", [_Vm("a-b"), _Vm("a_b")])


def test_a_misspelt_verb_is_answered_with_a_guess():
    with pytest.raises(AttributeError, match=r"Did you mean succeed\b.*docs/verbs.md"):
        run("machine.suceed('true')", [_Vm()])


def test_a_directory_shared_with_the_host_is_answered_with_what_there_is():
    with pytest.raises(Exception, match=r"machine\.copy_from_host\(\)"):
        run("machine.shared_dir", {"machine": _Vm()})


def test_output_is_nested_and_timed(capsys):
    run(
        """
        with subtest("outer"):
            with log.nested("inner"):
                machine.succeed("echo\\n    1")
        """,
        {"machine": _Vm()},
    )

    assert [re.sub(r"\d+\.\d+", "N", line) for line in capsys.readouterr().out.splitlines()] == [
        "[   N] subtest: outer",
        "[   N]     inner",
        "[   N]         machine.succeed('echo\\n    1')",
        "[   N]     (finished: inner, in N seconds)",
        "[   N] (finished: subtest: outer, in N seconds)",
    ]


# --- retry, conditions -----------------------------------------------------------------------


def test_retry_tells_its_function_of_the_last_try():
    with pytest.raises(WaitTimeoutError, match=r"never\(\)"):
        run(
            """
            asked = []
            def never(last):
                asked.append(last)
            try:
                retry(never, timeout_seconds=0)
            finally:
                assert asked == [True]
            """
        )


def test_retry_ends_with_the_first_success():
    run("retry(lambda last: not last)")


def test_a_condition_that_turns_false_ends_the_verb_under_way():
    vm = _Vm()

    with pytest.raises(PollingConditionError, match="'the light is on'") as caught:
        run(
            """
            asked = []

            @polling_condition(seconds_interval=0.01)
            def light():
                "the light is on"
                machine.succeed("look")
                asked.append(1)
                assert len(asked) < 4, "dark"

            with light:
                machine.succeed("hang")
            """,
            [vm],
        )

    vm.let_go.set()
    assert "dark" in str(caught.value.__cause__)
    assert vm.calls.count("hang") == 1
    assert vm.calls.count("look") == 4


def test_a_condition_is_waited_for_and_not_checked_outside_its_block():
    run(
        """
        asked = []

        def third():
            asked.append(1)
            return len(asked) == 3

        third = polling_condition(third, seconds_interval=0, description="the third time")
        third.wait(timeout=20)
        machine.succeed("a")
        t.assertEqual(len(asked), 3)
        asked[:] = [1, 1]
        with third:
            machine.succeed("b")
        t.assertEqual(len(asked), 3)
        """,
        [_Vm()],
    )


def test_a_condition_waited_for_in_vain():
    with pytest.raises(WaitTimeoutError, match=r"'never'.*\n.*no such light"):
        run(
            """
            @polling_condition
            def never():
                raise ValueError("no such light")
            never.wait(timeout=0)
            """
        )


def test_what_a_verb_raises_beside_a_condition_is_raised_in_the_script():
    run(
        """
        @polling_condition(seconds_interval=0.01)
        def fine():
            return True

        with fine:
            try:
                machine.succeed("boom")
            except RuntimeError as error:
                seen = str(error)
        assert seen == "boom"
        """,
        [_Vm()],
    )


class _Vm:
    """A machine that is up and remembers what it was told; only for what needs no VM."""

    fault = None

    def __init__(self, name: str = "vm") -> None:
        self.name = name
        self.calls: list[str] = []
        self.let_go = threading.Event()

    def is_up(self) -> bool:
        return True

    def succeed(self, command: str) -> str:
        self.calls.append(command)
        if command == "boom":
            raise RuntimeError(command)
        if command == "hang":
            assert self.let_go.wait(30)
        return ""


# --- docs/verbs.md ---------------------------------------------------------------------------


def test_the_page_of_the_verbs_has_every_verb_with_its_signature():
    page = (ROOT / "docs" / "verbs.md").read_text(encoding="utf-8")

    listed = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)

    assert sorted(listed) == sorted(
        _signature(name) for name in dir(Machine) if not name.startswith("_")
    )


def _signature(name: str) -> str:
    """A verb as the page writes it: names and defaults, no types."""
    member = inspect.getattr_static(Machine, name)
    if not callable(member):
        return name
    parts: list[str] = []
    for each in list(inspect.signature(member).parameters.values())[1:]:
        if each.kind is each.VAR_POSITIONAL:
            parts.append(f"*{each.name}")
            continue
        if each.kind is each.KEYWORD_ONLY and not any(part.startswith("*") for part in parts):
            parts.append("*")
        default = f"{each.default:g}" if isinstance(each.default, float) else repr(each.default)
        parts.append(each.name if each.default is each.empty else f"{each.name}={default}")
    return f"{name}({', '.join(parts)})"
