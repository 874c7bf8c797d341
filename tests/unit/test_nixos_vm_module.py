"""The module `vm`: what its options come to, in each of the systems that are made of a machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from _nixos_library import SYSTEMS, EvaluationFailed, evaluate

pytestmark = pytest.mark.nix

Value = Callable[[str], Any]

BACKENDS = ("qemu", "virtualbox", "vmware")
QEMU_VM = (
    """({ modulesPath, ... }: { imports = [ "${modulesPath}/virtualisation/qemu-vm.nix" ]; })"""
)
SHAPES = ("variant", "direct")


@pytest.fixture(scope="session", params=SYSTEMS)
def value(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Value:
    place = tmp_path_factory.mktemp("nixpkgs")
    return lambda expression: evaluate(request.param, place, expression)


def config(module: str) -> str:
    return f"(machine {module}).config"


def vm(module: str, shape: str = "variant") -> str:
    """The VM's configuration: of its own variant, or of a host that imports qemu-vm.nix itself."""
    if shape == "direct":
        return config(f"{{ imports = [ {QEMU_VM} {module} ]; }}")
    return config(module) + ".virtualisation.vmVariant"


def made_for(backend: str) -> str:
    return f'{{ vm.backend = "{backend}"; }}'


def image(module: str, variant: str) -> str:
    return config(module) + f".system.build.images.{variant}.passthru.config"


def refused(value: Value, module: str, what: str = "toplevel") -> str:
    with pytest.raises(EvaluationFailed) as caught:
        value(f"{config(module)}.system.build.{what}.drvPath")
    return str(caught.value)


# --- under QEMU ---------------------------------------------------------------------------------

SEEN = """
  c: {
    inherit (c.virtualisation) memorySize diskSize cores graphics restrictNetwork forwardPorts;
    agent = c.services.qemuGuest.enable;
  }
"""
PORT = {
    "from": "host",
    "proto": "udp",
    "host": {"address": "127.0.0.1", "port": 5353},
    "guest": {"address": "", "port": 53},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_defaults_are_small(value: Value, shape: str) -> None:
    assert value(f"({SEEN}) {vm('{ }', shape)}") == {
        "memorySize": 2048,
        "diskSize": 10240,
        "cores": 2,
        "graphics": False,
        "restrictNetwork": False,
        "forwardPorts": [],
        "agent": True,
    }


@pytest.mark.parametrize("shape", SHAPES)
def test_each_option_takes_effect_and_lists_are_not_doubled(value: Value, shape: str) -> None:
    module = """{
      vm = {
        memorySize = "1500M";
        diskSize = "1T";
        cores = 3;
        headless = false;
        guest.qemu = false;
        networking.mode = "isolated";
        networking.forwardPorts = [ { host = 5353; guest = 53; protocol = "udp"; } ];
      };
    }"""
    assert value(f"({SEEN}) {vm(module, shape)}") == {
        "memorySize": 1500,
        "diskSize": 1024 * 1024,
        "cores": 3,
        "graphics": True,
        "restrictNetwork": True,
        "forwardPorts": [PORT],
        "agent": False,
    }


def test_what_is_said_of_the_vm_itself_wins(value: Value) -> None:
    module = "{ virtualisation.vmVariant.virtualisation.memorySize = 512; }"
    assert value(f"{vm(module)}.virtualisation.memorySize") == 512
    assert value(f"{vm('{ virtualisation.vmVariant.vm.cores = 4; }')}.virtualisation.cores") == 4


def test_its_console_is_the_screen_if_it_has_one(value: Value) -> None:
    def consoles(headless: str) -> list[str]:
        found = value(f"{config(f'{{ vm.headless = {headless}; }}')}.boot.kernelParams")
        return [word for word in found if word.startswith("console=")]

    assert consoles("true") == ["console=tty0", "console=ttyS0,115200n8"]
    assert consoles("false") == ["console=ttyS0,115200n8", "console=tty0"]


def test_qemu_has_a_window_if_the_machine_has_a_screen(value: Value) -> None:
    def words(headless: str) -> list[str]:
        module = f"{{ vm.headless = {headless}; }}"
        found: list[str] = value(f"{vm(module)}.virtualisation.qemu.options")
        return found

    assert "-nographic" in words("true")
    assert "-nographic" not in words("false")


# --- shared folders -----------------------------------------------------------------------------

FOLDERS = """{
  vm.sharedFolders = {
    work.hostPath = "/srv/it's ours";
    home = { hostPath = "$HOME/my files"; guestPath = "/home/files"; };
    music = { hostPath = "/srv/music"; readOnly = true; };
  };
}"""


def test_folders_are_shares(value: Value) -> None:
    found = value(f"{vm(FOLDERS)}.virtualisation.sharedDirectories")
    assert {name: (found[name]["source"], found[name]["target"]) for name in ("work", "home")} == {
        "work": (r"'/srv/it'\''s ours'", "/mnt/work"),
        "home": ("\"$HOME\"/'my files'", "/home/files"),
    }
    assert "music" not in found


def test_a_folder_that_is_read_only_is_so_for_qemu(value: Value) -> None:
    found = value(
        f"(c: {{ inherit (c.virtualisation.qemu) options; fs = c.fileSystems; }}) ({vm(FOLDERS)})"
    )
    (share,) = [word for word in found["options"] if "mount_tag=music" in word]
    assert share.startswith("-virtfs local,path=/srv/music,") or "'/srv/music'" in share
    assert "readonly=on" in share.split(",")
    assert "ro" in found["fs"]["/mnt/music"]["options"]


def test_without_shares_there_are_no_folders(value: Value) -> None:
    module = f"""{{
      imports = [ {FOLDERS} ];
      virtualisation.vmVariant.virtualisation.sharedDirectories = lib.mkForce {{ }};
      virtualisation.vmVariant.virtualisation.useNixStoreImage = true;
    }}"""
    found = value(
        f"(c: {{ o = c.virtualisation.qemu.options; f = c.fileSystems; }}) ({vm(module)})"
    )
    assert not [word for word in found["o"] if "virtfs" in word]
    assert not [path for path in found["f"] if path.startswith(("/mnt", "/home"))]


@pytest.mark.parametrize(
    ("backend", "fs"),
    [("virtualbox", ("work", "vboxsf")), ("vmware", (".host:/work", "vmhgfs-fuse"))],
)
def test_other_hypervisors_folders_are_mounted_when_used(
    value: Value, backend: str, fs: tuple[str, str]
) -> None:
    module = f'{{ imports = [ {FOLDERS} ]; vm.backend = "{backend}"; }}'
    found = value(f"{config(module)}.fileSystems")
    assert found["/mnt/work"]["device"] == fs[0]
    assert found["/mnt/work"]["fsType"].endswith(fs[1])
    assert {"rw", "noauto", "x-systemd.automount"} <= set(found["/mnt/work"]["options"])
    assert "ro" in found["/mnt/music"]["options"]
    # Of these QEMU has none: there the folder is a share.
    assert value(f"{vm(module)}.fileSystems")["/mnt/work"]["fsType"] == "9p"


# --- backends -----------------------------------------------------------------------------------

ADDITIONS = """
  c: {
    qemu = c.services.qemuGuest.enable;
    virtualbox = c.virtualisation.virtualbox.guest.enable;
    vmware = c.virtualisation.vmware.guest.enable;
  }
"""


@pytest.mark.parametrize("backend", BACKENDS)
def test_guest_additions_follow_the_backend(value: Value, backend: str) -> None:
    found = value(f"({ADDITIONS}) {config(made_for(backend))}")
    assert found == {name: name == backend for name in BACKENDS}


def test_guest_additions_can_be_chosen(value: Value) -> None:
    module = "{ vm.guest = { qemu = false; virtualbox = true; vmware = true; }; }"
    assert value(f"({ADDITIONS}) {config(module)}") == {
        "qemu": False,
        "virtualbox": True,
        "vmware": True,
    }
    # Their services would wait for hardware that QEMU has not.
    assert value(f"({ADDITIONS}) {vm(module)}")["virtualbox"] is False


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_machine_without_hardware_configuration_is_whole(value: Value, backend: str) -> None:
    """Its system expects the disk of its backend's image; the VM and all images can be made."""
    made = value(
        f"""
        let c = {config(made_for(backend))}; in {{
          inherit (c.boot.loader) grub;
          inherit (c) fileSystems;
          grows = c.boot.growPartition;
          paths = map (d: d.drvPath) ([ c.system.build.toplevel c.system.build.vm ]
            ++ map (f: c.system.build.images.${{f}}) (builtins.attrValues library.formats));
        }}
        """
    )
    assert len(made["paths"]) == 2 + 7
    assert made["fileSystems"]["/"]["device"] == "/dev/disk/by-label/nixos"
    assert made["grows"] is True
    disk = {"qemu": "/dev/vda", "virtualbox": "/dev/sda", "vmware": "nodev"}[backend]
    assert made["grub"]["devices"] == [disk]
    assert made["grub"]["efiSupport"] is (backend == "vmware")
    assert ("/boot" in made["fileSystems"]) is (backend == "vmware")


def test_one_that_starts_by_systemd_boot_has_its_partition(value: Value) -> None:
    module = "{ boot.loader.systemd-boot.enable = true; }"
    found = value(f"{config(module)}.fileSystems")
    assert (found["/boot"]["device"], found["/boot"]["fsType"]) == (
        "/dev/disk/by-label/ESP",
        "vfat",
    )


def test_what_a_hardware_configuration_says_wins(value: Value) -> None:
    module = """{
      fileSystems."/" = { device = "/dev/disk/by-uuid/mine"; fsType = "btrfs"; };
      boot.loader.grub.devices = [ "/dev/sdb" ];
    }"""
    parts = "(c: { inherit (c) fileSystems; inherit (c.boot) loader growPartition; })"
    found = value(f"{parts} {config(module)}")
    root = found["fileSystems"]["/"]
    assert (root["device"], root["fsType"], root["autoResize"]) == (
        "/dev/disk/by-uuid/mine",
        "btrfs",
        False,
    )
    assert found["loader"]["grub"]["devices"] == ["/dev/sdb"]
    # Nor is a partition made larger that is not ours.
    assert found["growPartition"] is False


# --- images -------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["qemu", "raw-efi", "virtualbox", "vmware"])
def test_images_are_as_large_as_the_disk(value: Value, variant: str) -> None:
    module = '{ vm.diskSize = "3G"; }'
    assert value(f"{image(module, variant)}.virtualisation.diskSize") == 3072


@pytest.mark.parametrize(("visible", "size"), [("", 3072), ("visible = false;", "auto")])
def test_a_vmdk_is_so_before_26_05_as_well(value: Value, visible: str, size: int | str) -> None:
    """Its size had an option of its own, which is an alias today: using that one is a warning."""
    module = f"""{{
      vm.diskSize = "3G";
      image.modules.vmware = lib.mkForce ({{ modulesPath, ... }}: {{
        imports = [ "${{modulesPath}}/image/file-options.nix" ];
        options.vmware.baseImageSize = lib.mkOption {{ default = "auto"; {visible} }};
        config.image.extension = "vmdk";
        config.system.build.image = {{ }};
      }});
    }}"""
    assert value(f"{image(module, 'vmware')}.vmware.baseImageSize") == size


def test_an_ova_has_the_machine_s_memory_and_processors(value: Value) -> None:
    module = '{ vm.memorySize = "3G"; vm.cores = 4; }'
    found = value(f"{image(module, 'virtualbox')}.virtualbox")
    assert (found["memorySize"], found["params"]["cpus"]) == (3072, 4)


def test_images_have_the_console_and_the_agent(value: Value) -> None:
    found = value(
        f"(c: {{ inherit (c.boot) kernelParams; agent = c.services.qemuGuest.enable; }}) "
        f"{image('{ }', 'qemu')}"
    )
    assert found["kernelParams"].count("console=ttyS0,115200n8") == 1
    assert found["agent"] is True


@pytest.mark.parametrize(
    ("former", "variant", "format_"),
    [
        ("qcow2", "qemu", "qcow2"),
        ("virtualBoxOVA", "virtualbox", "ova"),
        ("vmwareImage", "vmware", "vmdk"),
    ],
)
def test_former_names_say_the_current_ones(
    value: Value, former: str, variant: str, format_: str
) -> None:
    said = refused(value, "{ }", former)
    assert f"system.build.{former} no longer exists" in said
    assert f"nixosConfigurations.machine.config.system.build.images.{variant}" in said
    assert f"nixvm image build machine --format {format_}" in said


def test_a_module_that_has_such_a_name_keeps_it(value: Value) -> None:
    assert value(f"{config('{ system.build.qcow2 = 7; }')}.system.build.qcow2") == 7


# --- what is no VM, and what is nonsense -------------------------------------------------------


def test_a_machine_without_it_is_left_as_it_is(value: Value) -> None:
    host = '{ fileSystems."/".device = "/dev/sda1"; boot.loader.grub.device = "/dev/sda"; }'
    same = value(
        f"""
        let
          build = modules:
            (nixosSystem {{ modules = [ base {host} ] ++ modules; }}).config.system.build;
          paths = build: map (d: d.drvPath) [ build.toplevel build.vm build.images.qemu ];
        in paths (build [ ]) == paths (build [
          flake.nixosModules.vm
          {{ vm.diskSize = "20G"; vm.sharedFolders.work.hostPath = "/srv"; }}
        ])
        """
    )
    assert same is True


@pytest.mark.parametrize(
    ("option", "text", "expected"),
    [
        ("diskSize", '"20 GB"', '"512M" or "20G"'),
        ("diskSize", "20", '"512M" or "20G"'),
        ("diskSize", '"0G"', '"512M" or "20G"'),
        ("memorySize", '"4.5G"', '"512M" or "20G"'),
        ("memorySize", '"32M"', 'from "64M"'),
        ("cores", "0", "between 1 and 255"),
        ("headless", '"yes"', "boolean"),
        ("backend", '"xen"', '"virtualbox"'),
        ("networking.mode", '"bridge"', '"isolated"'),
        ("networking.forwardPorts", "[ { host = 70000; guest = 1; } ]", "between 1 and 65535"),
        ("networking.forwardPorts", "[ { host = 80; guest = 0; } ]", "between 1 and 65535"),
        ("sharedFolders.work.hostPath", '"work"', "absolute path on the host"),
        ("sharedFolders.work.hostPath", '"/srv/a,b"', "without a comma"),
        ("sharedFolders.work.hostPath", "./.", "as a string"),
    ],
)
def test_nonsense_is_an_error_with_the_option_and_the_value(
    value: Value, option: str, text: str, expected: str
) -> None:
    said = refused(value, f"{{ vm.{option} = {text}; }}")
    (error,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert f"vm.{option.partition('.forward')[0]}" in error
    assert "is not of type" in error
    assert expected in error
    if text.startswith('"'):
        assert f": {text}" in said


def test_nonsense_is_an_error_of_the_vm_and_of_images_as_well(value: Value) -> None:
    for what in ("vm", "images.qemu", "images.iso"):
        assert "vm.memorySize' is not of type" in refused(value, "{ vm.memorySize = 4; }", what)


@pytest.mark.parametrize("path", ['"mnt"', '"/"', '"/a/../etc"', '"/a/./b"', '"/with blank"'])
def test_a_folder_s_place_is_below_the_root(value: Value, path: str) -> None:
    module = f'{{ vm.sharedFolders.work = {{ hostPath = "/srv"; guestPath = {path}; }}; }}'
    assert "vm.sharedFolders.work.guestPath" in refused(value, module)


@pytest.mark.parametrize(
    ("name", "why"),
    [("xchg", "have a folder of that name"), ('"a b"', "letters, digits"), ("a" * 32, "than 31")],
)
def test_a_folder_s_name_is_one_that_qemu_takes(value: Value, name: str, why: str) -> None:
    said = refused(value, f'{{ vm.sharedFolders.{name}.hostPath = "/srv"; }}')
    assert "vm.sharedFolders." in said
    assert why in said


@pytest.mark.parametrize("path", ["/nix/store", "/nix/var", "/tmp/shared", "/etc"])
def test_a_folder_hides_nothing_of_nixos(value: Value, path: str) -> None:
    module = f'{{ vm.sharedFolders.work = {{ hostPath = "/srv"; guestPath = "{path}"; }}; }}'
    assert f"vm.sharedFolders.work.guestPath: {path} is NixOS' own" in refused(value, module)


def test_a_port_of_the_host_leads_to_one_place(value: Value) -> None:
    def forwards(*more: str) -> str:
        given = " ".join(f"{{ host = 8080; guest = 80; {each} }}" for each in more)
        return f"{{ vm.networking.forwardPorts = [ {given} ]; }}"

    said = refused(value, forwards("", ""))
    assert "vm.networking.forwardPorts: tcp port 8080 of the host is forwarded twice" in said
    apart = config(forwards("", 'protocol = "udp";'))
    assert len(value(f"{apart}.vm.networking.forwardPorts")) == 2


@pytest.mark.parametrize("mode", ["", "readOnly = true;"])
def test_a_folder_has_a_place_of_its_own(value: Value, mode: str) -> None:
    module = f"""{{
      vm.sharedFolders.a.hostPath = "/srv";
      vm.sharedFolders.b = {{ hostPath = "/home"; guestPath = "/mnt/a"; {mode} }};
    }}"""
    assert "guestPath: /mnt/a is that of vm.sharedFolders." in refused(value, module)
