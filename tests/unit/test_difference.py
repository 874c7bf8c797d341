"""What differs between two generations: packages, units, /etc, what waits for a reboot."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from _flake import OPTIONS, needs_nix

from pytest_nixvm.errors import ChangeError, EvaluationError
from pytest_nixvm.flake import Nix
from pytest_nixvm.flake.contents import Store
from pytest_nixvm.flake.difference import Difference, difference
from pytest_nixvm.flake.etc_files import compare_activation, compare_etc, compare_specialisations
from pytest_nixvm.flake.packages import (
    Closure,
    PackageDifference,
    compare_closures,
    compare_versions,
    parse_closure,
    split_name,
)
from pytest_nixvm.flake.units import UnitChange, UnitDifference, compare_units

Files = Mapping[str, str | Path]


class Sides:
    """A store with things of two generations: `old` and `new` have hashes of their own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = Store(root)

    def path(self, side: str, name: str) -> Path:
        return self.root / f"{hashlib.sha256(side.encode()).hexdigest()[:32]}-{name}"

    def put(self, side: str, name: str, files: Files | str) -> Path:
        """Write a store path: a text, or a folder of texts and (paths) links."""
        path = self.path(side, name)
        if isinstance(files, str):
            self.root.mkdir(exist_ok=True)
            path.write_text(files)
            return path
        path.mkdir(parents=True)
        for file, content in files.items():
            (path / file).parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                (path / file).symlink_to(content)
            else:
                (path / file).write_text(content)
        return path

    def units(self, old: Files, new: Files) -> UnitDifference:
        """Compare systems with these files in etc/systemd/system, which is a link."""
        systems = []
        for side, files in (("old", old), ("new", new)):
            units = self.put(side, "system-units", files)
            systems.append(self.put(side, "nixos-system-x-1", {"etc/systemd/system": units}))
        return compare_units(self.store, *systems)

    def systems(self, old: Files, new: Files) -> tuple[Path, Path]:
        return (self.put("old", "nixos-system-x-1", old), self.put("new", "nixos-system-x-1", new))


@pytest.fixture
def sides(tmp_path: Path) -> Sides:
    return Sides(tmp_path / "store")


# --- packages ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("curl-8.5.0", ("curl", "8.5.0")),
        ("curl-8.5.0-bin", ("curl", "8.5.0")),
        ("glibc-2.40-66", ("glibc", "2.40-66")),
        ("python3-3.13.1-env", ("python3", "3.13.1")),
        ("python3.13-requests-2.32", ("python3.13-requests", "2.32")),
        ("linux-6.12.1-modules-shrunk", ("linux", "6.12.1")),
        ("tool-0-unstable-2025-01-02", ("tool", "0-unstable-2025-01-02")),
        ("openssh-9.9p1", ("openssh", "9.9p1")),
        ("etcd-3.5.16", ("etcd", "3.5.16")),
        ("git", ("git", "")),
        ("base-packages", ("base-packages", "")),
    ],
)
def test_a_store_paths_name_is_split_as_nix_does(name: str, expected: tuple[str, str]) -> None:
    assert split_name(name) == expected


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ("1.9", "1.10"),
        ("2.3", "2.3.1"),
        ("2.3pre1", "2.3"),
        ("2.3a", "2.3c"),
        ("2.3pre3", "2.3pre12"),
        ("9.9p1", "10.0p1"),
        ("", "1"),
    ],
)
def test_versions_have_nixs_order(older: str, newer: str) -> None:
    assert compare_versions(older, newer) == -1
    assert compare_versions(newer, older) == 1
    assert compare_versions(newer, newer) == 0


@pytest.mark.parametrize("form", ["list", "mapping", "format 2"])
def test_what_nix_prints_is_read_in_each_of_its_forms(form: str) -> None:
    a, b = "/nix/store/" + "a" * 32 + "-a-1", "/nix/store/" + "b" * 32 + "-b-2"

    def about(size: int, *references: str) -> dict[str, object]:
        return {"narSize": size, "narHash": "sha256-x", "references": references, "more": 1}

    answer: object = {a: about(1, b), b: about(2)}
    if form == "list":
        answer = [{"path": a, **about(1, b)}, {"path": b, **about(2)}]
    if form == "format 2":
        one, other = Path(a).name, Path(b).name
        answer = {"version": 2, "storeDir": "/nix/store"}
        answer["info"] = {one: about(1, other), other: about(2)}
    closure = parse_closure(json.loads(json.dumps(answer)))
    assert closure == Closure({a: 1, b: 2}, {a: (b,), b: ()})
    assert closure.size == 3


def test_a_path_that_nix_does_not_know_is_said() -> None:
    with pytest.raises(ValueError, match="gone is not in the store"):
        parse_closure({"/nix/store/" + "a" * 32 + "-gone": None})


def closures(sides: Sides, old: Mapping[str, int], new: Mapping[str, int]) -> PackageDifference:
    """Compare closures of packages (name → bytes); "!" has it be the same path in both."""
    made = []
    for side, names in (("old", old), ("new", new)):
        sizes = {}
        for name, size in names.items():
            path = sides.path("both" if name.startswith("!") else side, name.lstrip("!"))
            (path / "bin").mkdir(parents=True, exist_ok=True)
            sizes[str(path)] = size
        made.append(Closure(sizes, {}))
    return compare_closures(made[0], made[1], [str(sides.path("new", "hello-2.12"))])


def test_packages_are_compared_by_name_and_version(sides: Sides) -> None:
    found = closures(
        sides,
        {"!same-1": 1, "up-1.9": 10, "up-1.9-man": 5, "down-3": 1, "gone-1": 7, "again-1": 3},
        {"!same-1": 1, "up-1.10": 20, "up-1.10-man": 6, "down-2": 1, "hello-2.12": 9, "again-1": 3},
    )
    told = [(c.kind, c.name, c.before, c.after, c.size, c.chosen) for c in found.changes]
    assert told == [
        ("downgraded", "down", ("3",), ("2",), 0, False),
        ("removed", "gone", ("1",), (), -7, False),
        ("added", "hello", (), ("2.12",), 9, True),
        ("upgraded", "up", ("1.9",), ("1.10",), 11, False),
    ]
    assert found.rebuilt == ("again",)
    assert [change.name for change in found.upgraded] == ["down", "up"]
    assert (found.size_before, found.size_after) == (27, 40)


def test_a_second_version_beside_the_first_is_neither_new_nor_newer(sides: Sides) -> None:
    found = closures(sides, {"!lib-2": 1}, {"!lib-2": 1, "lib-1": 1})
    assert [(c.kind, c.before, c.after) for c in found.changes] == [("changed", ("2",), ("1", "2"))]


def test_what_is_made_for_each_configuration_is_no_package(sides: Sides) -> None:
    derived = ["etc", "unit-a.service", "nixos-system-x-25.11", "system-path", "initrd-linux-6.1"]
    derived += ["etc-os-release", "X-Restart-Triggers-sshd", "home-manager-generation", "dbus-1"]
    found = closures(sides, dict.fromkeys(derived, 1), dict.fromkeys([*derived, "etcd-3"], 2))
    assert [change.name for change in found.changes] == ["etcd"]
    assert found.rebuilt == ()
    assert found.size_after == 2 * len(derived) + 2


# --- units ---------------------------------------------------------------------------------------

SERVICE = "[Unit]\nDescription=A\n[Service]\nExecStart=/a\nExecReload=/r\n"


@pytest.mark.parametrize(
    ("name", "old", "new", "kind"),
    [
        ("a.service", "ExecStart=/a", "ExecStart=/b", "restart"),
        ("a.service", "Description=A", "Description=B\nDocumentation=man:a", "none"),
        ("a.service", "Description=A", "Description=A\nAfter=b.service", "restart"),
        ("a.service", "Description=A", "Description=A\nX-Restart-Triggers=/x", "restart"),
        ("a.service", "Description=A", "Description=A\nX-Reload-Triggers=/x", "reload"),
        ("a.service", "ExecReload=/r", "ExecReload=/s", "reload"),
        ("a.service", "ExecReload=/r", "", "none"),
        ("a.service", "ExecStart=/a", "ExecStart=/b\nX-RestartIfChanged=false", "keep"),
        ("a.service", "ExecStart=/a", "ExecStart=/b\nX-ReloadIfChanged=true", "reload"),
        ("a.service", "ExecStart=/a", "ExecStart=/b\nX-StopIfChanged=false", "restart"),
        ("a.service", "Description=A", "After=b.service\nRefuseManualStop=true", "keep"),
        ("a.socket", "ExecStart=/a", "ExecStart=/b", "keep"),
        ("a.timer", "ExecStart=/a", "ExecStart=/b", "restart"),
        ("a.slice", "ExecStart=/a", "ExecStart=/b", "none"),
        ("a.target", "Description=A", "After=b.service", "none"),
        ("nix.mount", "ExecStart=/a", "ExecStart=/b", "reload"),
        ("a.service", "ExecStart=/a", "# a comment\nExecStart = /a", "none"),
        ("a.service", "ExecStart=/a", "ExecStart=/a\n[Install]\nWantedBy=x.target", "none"),
    ],
)
def test_a_unit_is_compared_as_the_switch_does(
    sides: Sides, name: str, old: str, new: str, kind: str
) -> None:
    changed = sides.units({name: SERVICE}, {name: SERVICE.replace(old, new)}).changed
    assert [(change.name, change.kind) for change in changed] == [(name, kind)]


def test_mount_options_alone_are_reloaded(sides: Sides) -> None:
    mount = "[Mount]\nWhat=x\nOptions="
    found = sides.units({"srv.mount": mount + "ro"}, {"srv.mount": mount + "rw"})
    assert found.changed == (UnitChange("srv.mount", "reload", ("Mount.Options",)),)


def test_drop_ins_count_to_their_unit(sides: Sides) -> None:
    found = sides.units(
        {"a.service": SERVICE, "getty@.service.d/overrides.conf": "[Service]\nRestart=no"},
        {
            "a.service": SERVICE,
            "a.service.d/overrides.conf": "[Service]\nExecStart=\nExecStart=/b",
            "getty@.service.d/overrides.conf": "[Service]\nRestart=always",
        },
    )
    assert [(c.name, c.kind, c.keys) for c in found.changed] == [
        ("a.service", "restart", ("Service.ExecStart",)),
        ("getty@.service", "restart", ("Service.Restart",)),
    ]
    assert "+# a.service.d/overrides.conf" in found.diff("a.service")
    assert "-Restart=no\n+Restart=always\n" in found.diff("getty@.service")


def test_units_come_and_go_and_a_mask_is_an_end(sides: Sides) -> None:
    found = sides.units(
        {"gone.service": SERVICE, "masked.service": SERVICE, "dbus.service": Path("a.service")},
        {"new.service": SERVICE, "masked.service": Path("/dev/null")},
    )
    assert found.added == ("new.service",)
    assert found.removed == ("dbus.service", "gone.service", "masked.service")
    assert found.changed == ()
    assert "-ExecStart=/a" in found.diff("gone.service")
    assert found.diff("no-such.service") == ""


def test_a_unit_that_is_not_the_configurations_own_is_told_when_masked_or_wanted(
    sides: Sides,
) -> None:
    found = sides.units(
        {}, {"a.service": Path("/dev/null"), "x.target.wants/b.service": Path("/usr/b.service")}
    )
    assert found.changed == (
        UnitChange("a.service", "none", ("masked",)),
        UnitChange("b.service", "none", ("wanted by x.target",)),
    )


def test_an_alias_does_not_tell_its_units_change_again(sides: Sides) -> None:
    alias = {"alias.service": Path("a.service")}
    found = sides.units(
        {"a.service": SERVICE, **alias}, {"a.service": SERVICE.replace("/a", "/b"), **alias}
    )
    assert [change.name for change in found.changed] == ["a.service"]


def test_a_unit_that_is_started_from_now_on_is_told(sides: Sides) -> None:
    wants = {"multi-user.target.wants/a.service": Path("../a.service")}
    found = sides.units({"a.service": SERVICE}, {"a.service": SERVICE, **wants})
    assert found.changed == (UnitChange("a.service", "none", ("wanted by multi-user.target",)),)


def test_a_link_out_of_the_store_is_the_machines_not_ours(sides: Sides, tmp_path: Path) -> None:
    (tmp_path / "a.service").write_text("[Service]\nExecStart=/of-this-host\n")
    outside = {"a.service": tmp_path / "a.service"}
    found = sides.units(outside, outside)
    assert found.is_empty
    assert "of-this-host" not in found.before["a.service"].full


def test_a_script_that_a_unit_names_is_followed(sides: Sides) -> None:
    texts = {}
    for side, words in (("old", "hello"), ("new", "goodbye")):
        config = sides.put(side, "a.conf", f"say = {words}\n")
        script = sides.put(side, "unit-script-a-start", {"bin/a-start": f"run {config}\n"})
        texts[side] = {"a.service": f"[Service]\nExecStart={script}/bin/a-start\n"}
    found = sides.units(texts["old"], texts["new"])
    assert found.changed == (UnitChange("a.service", "restart", (), ("a.conf",)),)
    assert found.diff("a.service") == (
        "--- a/a.conf\n+++ b/a.conf\n@@ -1 +1 @@\n-say = hello\n+say = goodbye\n"
    )


def test_a_unit_of_packages_that_were_built_anew_is_told_apart(sides: Sides) -> None:
    texts = {}
    for side in ("old", "new"):
        package = sides.put(side, "hello-2.12", {"bin/hello": f"\0{side}"})
        texts[side] = {"a.service": f"[Service]\nExecStart={package}/bin/hello\n"}
    found = sides.units(texts["old"], texts["new"])
    assert found.changed == (UnitChange("a.service", "restart", (), (), ("Service.ExecStart",)),)
    assert found.changed[0].only_rebuilt
    assert found.diff("a.service") == ""


def test_a_line_that_goes_on_is_one_value(sides: Sides) -> None:
    old = "[Service]\nExecStart=/a one \\\n  two\n"
    new = "[Service]\nExecStart=/a one \\\n# why\n  three\n"
    found = sides.units({"a.service": old}, {"a.service": new})
    assert found.changed == (UnitChange("a.service", "restart", ("Service.ExecStart",)),)


# --- /etc, specialisations, activation -----------------------------------------------------------


def test_files_of_etc_are_compared_by_content(sides: Sides) -> None:
    same = {side: sides.put(side, "same.conf", "x") for side in ("old", "new")}
    rules = {side: sides.put(side, "udev-rules", {"1.rules": side}) for side in ("old", "new")}
    users = {side: sides.put(side, "user-units", {"u.service": side}) for side in ("old", "new")}

    def etc(side: str, **more: str) -> dict[str, str | Path]:
        return {
            "etc/same.conf": same[side],
            "etc/udev/rules.d": rules[side],
            "etc/systemd/user": users[side],
            "etc/systemd/system/a.service": side,
            **{f"etc/{name}": text for name, text in more.items()},
        }

    found = compare_etc(
        sides.store,
        *sides.systems(
            etc("old", gone="1", key="k", **{"key.mode": "0400", "new.mode": "x"}),
            etc("new", new="1", key="k", **{"key.mode": "0600", "new.mode": "x"}),
        ),
    )
    assert found.added == ("new",)
    assert found.removed == ("gone",)
    assert found.changed == ("key", "systemd/user/u.service", "udev/rules.d")


def test_specialisations_are_named(sides: Sides) -> None:
    inner = {name: sides.put(name, "nixos-system-y-1", {"x": name}) for name in ("1", "2")}
    found = compare_specialisations(
        sides.store,
        *sides.systems(
            {"specialisation/gone": inner["1"], "specialisation/other": inner["1"]},
            {"specialisation/new": inner["1"], "specialisation/other": inner["2"]},
        ),
    )
    assert (found.added, found.removed, found.changed) == (("new",), ("gone",), ("other",))


def test_activation_snippets_are_named_and_their_files_stay_unread(sides: Sides) -> None:
    scripts = []
    for side in ("old", "new"):
        users = sides.put(side, "users-groups.json", f'{{"hash": "{side}"}}')
        etc = sides.put(side, "etc", {"x": side})
        own = sides.path(side, "nixos-system-x-1")
        parts = {"users": f"read {users}", "etc": f"set {etc}", "mine": f"echo {side}"}
        parts |= {side: "true"}
        text = f"systemConfig={own}\n" + "".join(
            f"#### Activation script snippet {name}:\n{text}\n" for name, text in parts.items()
        )
        scripts.append({"activate": text})
    found = compare_activation(sides.store, *sides.systems(*scripts))
    assert found == ("users (users-groups.json)", "mine", "new (new)", "old (removed)")


# --- the whole -----------------------------------------------------------------------------------

FLAKE = r"""
{ outputs = _: let
  build = name: command: derivation {
    inherit name; system = "SYSTEM"; builder = "/bin/sh";
    args = [ "-ec" "PATH=/run/current-system/sw/bin:/usr/bin:/bin\n${command}" ];
  };
  package = name: build name "mkdir -p $out/bin; echo ${name} > $out/bin/x";
  system = { tools, linux, params, unit, interface ? 1 }: build "nixos-system-x-1" ''
    mkdir -p $out/etc/systemd/system; cd $out
    ln -s ${build "system-path" "mkdir $out; echo ${toString tools} > $out/x"} sw
    ln -s ${build "linux-${linux}" "mkdir -p $out; echo ${linux} > $out/bzImage"}/bzImage kernel
    echo '${params}' > kernel-params; echo true > activate; echo ${toString interface} > \
      init-interface-version
    printf '[Service]\nExecStart=${package "server-1"}/bin/x\nRestart=%s\n' ${unit} \
      > etc/systemd/system/server.service
  '';
  first = { tools = [ (package "hello-2.10") ]; linux = "6.1.9"; params = "a b"; unit = "no"; };
in {
  before = system first;
  after = system (first // {
    tools = [ (package "hello-2.12") ]; linux = "6.1.10"; params = "b c"; unit = "always";
    interface = 2;
  });
}; }
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Difference]:
    folder = tmp_path_factory.mktemp("flake")
    nix = Nix.find(options=OPTIONS)
    (folder / "flake.nix").write_text(FLAKE.replace("SYSTEM", nix.system))
    outputs = []
    for name in ("before", "after"):
        drv = nix.evaluate(f"path:{folder}#{name}", "d: d.drvPath", timeout=60).value
        nix.realise(drv, "out", folder / name, timeout=60)
        outputs.append(folder / name)
    return lambda: difference(nix, *outputs, options=lambda: ({"a": "1", "b": "2"}, {"a": "3"}))


@needs_nix
def test_two_systems_that_nix_built(built: Callable[[], Difference]) -> None:
    found = built()
    assert not found.is_empty
    [hello, linux] = found.packages.upgraded
    assert (hello.name, hello.before, hello.after) == ("hello", ("2.10",), ("2.12",))
    assert hello.chosen
    assert not linux.chosen
    assert found.kernel is not None
    assert (found.kernel.before, found.kernel.after) == ("6.1.9", "6.1.10")
    assert found.initrd is None
    assert found.needs_reboot == ("kernel", "kernel parameters", "init")
    assert found.size_before > hello.size
    assert "-Restart=no\n+Restart=always" in found.unit_diff("server.service")
    text = found.text()
    first = "Only after a reboot: kernel 6.1.9 → 6.1.10; kernel parameters -a +c; init interface 1"
    assert text.startswith(first)
    assert "  ↑ hello 2.10 → 2.12" in text
    assert "  ~ server.service restarts: Service.Restart" in text
    assert "/etc" not in text
    assert json.loads(json.dumps(found.to_json()))["kernel"]["after"] == "6.1.10"


@needs_nix
def test_options_are_asked_for_only_when_wanted(built: Callable[[], Difference]) -> None:
    found = built()
    assert found.options == {"a": ("1", "3"), "b": ("2", None)}
    assert "Options:\n  a: 1 → 3\n  b: 2 → not set" in found.text(options=True)
    assert found.to_json(options=True)["options"] == {"a": ["1", "3"], "b": ["2", None]}


@needs_nix
def test_a_system_equals_itself(built: Callable[[], Difference]) -> None:
    same = difference(Nix.find(), built().base, built().base)
    assert same.is_empty
    assert same.units.is_empty
    assert same.packages.changes == ()
    assert same.text() == f"Nothing differs: both are {same.base}."


@needs_nix
def test_what_is_no_system_is_said(tmp_path: Path, built: Callable[[], Difference]) -> None:
    with pytest.raises(ChangeError, match="not in the Nix store any more"):
        difference(Nix.find(), tmp_path / "gone", built().candidate)
    with pytest.raises(ChangeError, match="no NixOS system"):
        difference(Nix.find(), tmp_path, built().candidate)


def whole(**parts: object) -> Difference:
    empty = UnitDifference((), (), ())
    given = {"packages": PackageDifference((), (), 1, 1), "units": empty, **parts}
    return Difference(Path("/a"), Path("/b"), **given)  # type: ignore[arg-type]


def test_options_that_cannot_be_had_are_said_in_the_text() -> None:
    def ask() -> tuple[dict[str, str], dict[str, str]]:
        raise EvaluationError("main does not evaluate.\nMore.")

    found = whole(ask_options=ask, activation=("users",))
    assert found.text(options=True).endswith("Options:\n  can't be told: main does not evaluate.")
    assert "Options" not in found.text()
    with pytest.raises(EvaluationError):
        _ = found.options


def test_long_lists_are_cut_and_units_built_anew_are_one_line() -> None:
    changed = tuple(UnitChange(f"{n}.service", "restart", (), (), ("x",)) for n in range(20))
    units = UnitDifference(tuple(f"new-{n}.service" for n in range(50)), (), changed)
    lines = whole(units=units).text(rows=5).splitlines()
    assert lines[:2] == ["Units:", "  + new-0.service"]
    assert lines[5] == "  … and 46 more"
    assert lines[6].startswith("  ~ 0.service, 1.service, ")
    assert lines[6].endswith("(20 in all): restart, only for what was built anew")
    assert len(lines) == 7
    assert len(whole(units=units).text(rows=None).splitlines()) == 52


def test_systems_in_which_nothing_differs_that_can_be_told() -> None:
    assert whole().text().startswith("Nothing differs that a user would see")
