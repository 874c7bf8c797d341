"""`pytest_nixvm.template`: what it makes of a function, and what it says of a wrong one."""

from __future__ import annotations

from pathlib import Path

import pytest
from _flake import needs_nix
from test_plugin import Project

import pytest_nixvm
from pytest_nixvm import Fleet, Settings
from pytest_nixvm.errors import SettingsError


@pytest.fixture
def project(pytester: pytest.Pytester) -> Project:
    return Project(pytester)


PREPARED = '''
import pytest_nixvm

@pytest_nixvm.template("web")
def with_data(vm):
    """The web server, with data."""
    vm.succeed("true")

@pytest_nixvm.template()
def anywhere(vm):
    """Any machine, prepared."""

def test_one(with_data): pass
def test_each(anywhere): pass
'''


def test_a_template_is_a_fixture_with_the_function_s_name_and_words(
    pytester: pytest.Pytester,
) -> None:
    pytester.makepyfile(PREPARED.partition("def test_one")[0])
    done = pytester.runpytest_inprocess("--fixtures", "-q")
    done.stdout.fnmatch_lines(
        ["with_data*", "*The web server, with data.", "anywhere*", "*Any machine, prepared."],
    )


@needs_nix
def test_one_without_a_machine_is_run_for_each_of_them(project: Project) -> None:
    project.write(PREPARED)
    assert set(project.collected()) == {
        "test_one",
        "test_each[web]",
        "test_each[db]",
        "test_each[pi]",
        "test_each[mac]",
    }


@needs_nix
def test_an_unknown_machine_is_said_without_our_code(project: Project) -> None:
    project.write(PREPARED.replace('"web"', '"wep"'))
    done = project.run("-k", "one")
    said = done.stdout.str()
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    assert "its template names 'wep'" in done.stderr.str()
    assert "Did you mean 'web'?" in done.stderr.str()
    assert "fixtures.py" not in said


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("def f(): pass", r"f\(\) has to take one argument, the machine"),
        ("def f(vm, tmp_path): pass", r"f\(vm, tmp_path\) has to take one argument"),
        ("def f(*, vm): pass", r"f\(\*, vm\) has to take one argument"),
        ("def f(vm): yield", "f yields or awaits"),
        ("async def f(vm): pass", "f yields or awaits"),
    ],
)
def test_a_function_that_can_not_prepare_a_machine_is_said_at_once(
    function: str, says: str, tmp_path: Path
) -> None:
    names: dict[str, object] = {}
    exec(function, names)
    with pytest.raises(SettingsError, match=says):
        pytest_nixvm.template("web")(names["f"])  # type: ignore[arg-type]
    # The same without pytest, and before anything is evaluated or built.
    with (
        Fleet(Settings.make(cache=str(tmp_path))) as fleet,
        pytest.raises(SettingsError, match=says),
    ):
        fleet.template("web", names["f"])  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_one_with_defaults_is_a_function_of_a_machine() -> None:
    def prepare(vm: object, rows: int = 10, *more: object) -> None:
        """Rows."""

    assert pytest_nixvm.template("web")(prepare) is not None


def test_the_mistake_is_shown_where_the_test_was_collected(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        "import pytest_nixvm\n@pytest_nixvm.template('web')\ndef with_data(vm, tmp_path): pass\n"
        "def test_it(with_data): pass\n"
    )
    done = pytester.runpytest_inprocess()
    assert done.ret == pytest.ExitCode.INTERRUPTED
    done.stdout.fnmatch_lines(["*SettingsError: with_data(vm, tmp_path) has to take one argument*"])


def test_brackets_that_were_forgotten_and_words_that_do_not_exist() -> None:
    with pytest.raises(SettingsError, match=r"@pytest_nixvm\.template\(\)"):

        @pytest_nixvm.template  # type: ignore[arg-type]
        def prepare(vm: object) -> None: ...

    with pytest.raises(TypeError, match="memroy"):
        pytest_nixvm.template("web", memroy=512)  # type: ignore[call-arg]


def test_a_network_that_does_not_exist_is_said(tmp_path: Path) -> None:
    with Fleet(Settings.make(cache=str(tmp_path))) as fleet:
        for start in (
            lambda: fleet.start("web", network="bridge"),
            lambda: fleet.template("web", lambda vm: None, network="bridge"),
        ):
            with pytest.raises(SettingsError, match="'bridge' is not one of isolated, nat"):
                start()


def test_what_is_prepared_is_handed_on_as_it_was_asked_for(pytester: pytest.Pytester) -> None:
    """The fixture asks the fleet, gives each test a machine of its own, and ends it."""
    pytester.makeconftest(
        """
        import pytest
        from pathlib import Path
        from pytest_nixvm.fleet import Fleet
        from pytest_nixvm.run import Run
        from pytest_nixvm.snapshots import Snapshot

        Run._check = Fleet.prepare = lambda *_: None  # there is no flake
        NUMBERS = iter(range(9))

        class Machine:
            def __init__(self):
                self.number = next(NUMBERS)
            def __enter__(self):
                return self
            def __exit__(self, *_):
                print("ENDED", self.number)

        @pytest.fixture(autouse=True)
        def no_vms(monkeypatch):
            def template(self, name, prepare, **properties):
                print("\\nASKED", name, prepare.__name__, properties)
                return Snapshot("x", name, None, Machine, None)
            monkeypatch.setattr(Fleet, "template", template)
            monkeypatch.setattr(Fleet, "expect", lambda *_: None)
        """
    )
    pytester.makepyfile(
        """
        import pytest_nixvm

        @pytest_nixvm.template("web", depends=("14",), memory=512, network="nat")
        def with_data(vm): pass

        def test_a(with_data):
            print("GOT", with_data.number)

        def test_b(with_data):
            print("GOT", with_data.number)
            assert 0
        """
    )
    # A process of its own: what is replaced here stays replaced.
    done = pytester.runpytest_subprocess("-s")
    done.assert_outcomes(passed=1, failed=1)
    asked = "ASKED web with_data " + str(
        {"depends": ("14",), "memory": 512, "cores": None, "network": "nat"}
    )
    said = [line.lstrip(".F") for line in done.outlines]
    steps = [line for line in said if line.startswith(("ASKED", "GOT", "ENDED"))]
    assert steps == [asked, "GOT 0", "ENDED 0", asked, "GOT 1", "ENDED 1"]
