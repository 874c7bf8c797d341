"""What modules/declared.nix and modules/interface.nix say of a configuration, as values."""

from __future__ import annotations

import pytest
from _flake import needs_nix
from _nix_modules import evaluate

from pytest_nixvm.flake.declared import Declared, FileSystem, Firewall, Interface, Ssh

LAPTOP = """rec {
  networking = {
    hostName = "laptop";
    firewall = {
      enable = true; allowedTCPPorts = [ 80 22 ];
      allowedUDPPortRanges = [ { from = 60000; to = 61000; } ];
      interfaces = { enp3s0.allowedTCPPorts = [ 9090 ]; tailscale0.allowedTCPPorts = [ 1 ]; };
      trustedInterfaces = [ "tailscale0" ]; extraCommands = "iptables -A INPUT -j ACCEPT";
    };
    interfaces.enp3s0 = {
      useDHCP = null; ipv4.addresses = [ { address = "192.168.1.10"; prefixLength = 24; } ];
    };
    interfaces.wlp2s0.useDHCP = true;
    defaultGateway = { address = "192.168.1.1"; interface = "enp3s0"; };
    wireless.iwd.enable = true;
  };
  services.openssh = { enable = true; ports = [ 2222 ]; openFirewall = false; };
  services.timesyncd.enable = true;
  users.users = {
    root.hashedPassword = "!";
    alice = {
      isNormalUser = true; home = "/home/alice";
      openssh.authorizedKeys.keys = [ "ssh-ed25519 AAAA" ];
      shell = { type = "derivation"; shellPath = "/bin/zsh"; };
      hashedPasswordFile = "/run/secrets-for-users/alice";
    };
    nginx.isSystemUser = true;
    gone = { isNormalUser = true; enable = false; };
  };
  home-manager.users.alice = {
    home.packages = throw "not looked at"; sops.secrets.mail = { };
  };
  specialisation.battery.configuration = throw "not looked at";
  system.switch.enable = false;
  boot = {
    kernelModules = [ "kvm-intel" ]; loader.systemd-boot.enable = true; loader.grub.enable = false;
    initrd.luks.devices.cryptroot.device = "/dev/sda2"; lanzaboote.enable = true;
  };
  fileSystems."/" = { mountPoint = "/"; fsType = "btrfs"; device = "/dev/mapper/cryptroot"; };
  swapDevices = [ { device = "/dev/sda3"; } ];
  disko.devices.disk.main.device = "/dev/sda";
  hardware.graphics.enable = true;
  services.xserver.videoDrivers = [ "nvidia" "fbdev" ];
}"""


def declared(configuration: str) -> Declared:
    return Declared.from_json(
        evaluate(
            f"let c = {configuration}; in import (modules + /declared.nix) {{ real = c; vm = c; }}"
        )
    )


@needs_nix
def test_a_laptop() -> None:
    laptop = declared(LAPTOP)
    assert laptop.host_name == "laptop"
    assert laptop.ssh == Ssh((2222,), open_firewall=False)
    assert not laptop.switchable
    assert (laptop.home_manager, laptop.specialisations) == (("alice",), ("battery",))
    assert laptop.home_secrets == ("alice",)
    assert laptop.kernel_modules == ("kvm-intel",)
    assert laptop.interfaces == (
        Interface("enp3s0", (("192.168.1.10", 24),)),
        Interface("wlp2s0", dhcp=True),
    )
    assert (laptop.interface, laptop.other_interfaces) == ("enp3s0", ("wlp2s0",))
    assert (laptop.address, laptop.gateway) == (("192.168.1.10", 24), "192.168.1.1")


@needs_nix
def test_its_users() -> None:
    users = {user.name: user for user in declared(LAPTOP).users}
    assert sorted(users) == ["alice", "root"]
    alice = users["alice"]
    assert (alice.normal, alice.keys, alice.home) == (True, 1, "/home/alice")
    assert alice.shell == "/run/current-system/sw/bin/zsh"
    assert (alice.password, alice.password_file) == ("file", "/run/secrets-for-users/alice")
    assert (users["root"].password, users["root"].hashed) == ("hashed", "!")


@needs_nix
def test_its_firewall() -> None:
    firewall = declared(LAPTOP).firewall
    assert firewall.tcp == ((22, 22), (80, 80))
    assert firewall.udp == ((60000, 61000),)
    assert firewall.own_rules
    assert firewall.opens(22, "enp3s0")
    assert firewall.opens(9090, "enp3s0")
    assert not firewall.opens(9090, "eth0")
    assert not firewall.opens(1, None)
    assert firewall.opens(4711, "tailscale0")
    assert firewall.opens(60500, None, "udp")
    assert not firewall.opens(60500, None)
    assert Firewall(enabled=False).opens(1, None)


@needs_nix
def test_what_only_the_real_machine_has() -> None:
    real = declared(LAPTOP).real
    assert real.file_systems == (FileSystem("/", "btrfs", "/dev/mapper/cryptroot"),)
    assert (real.luks, real.swap) == (("cryptroot",), ("/dev/sda3",))
    assert real.disko
    assert (real.boot_loader, real.secure_boot) == ("lanzaboote", True)
    assert real.video_drivers == ("nvidia",)
    assert real.wireless
    assert real.time_sync == "systemd-timesyncd"


@needs_nix
def test_options_that_a_nixpkgs_does_not_have() -> None:
    assert declared("{ }") == Declared()
    assert Declared.from_json({}) == Declared()


@needs_nix
def test_what_can_t_be_evaluated_does_not_hide_the_rest() -> None:
    found = declared(
        """{
          networking.hostName = throw "no"; networking.interfaces = throw "no"; boot = throw "no";
          users.users = { bad = { isNormalUser = throw "no"; }; bob.isNormalUser = true; };
          fileSystems = { "/" = { mountPoint = "/"; }; "/x" = throw "no"; };
        }"""
    )
    assert [user.name for user in found.users] == ["bob"]
    assert [fs.mount_point for fs in found.real.file_systems] == ["/"]


# --- the name of the network card ---

STATIC = 'ipv4.addresses = [ { address = "10.1.0.2"; prefixLength = 16; } ]'


@needs_nix
@pytest.mark.parametrize(
    ("networking", "name"),
    [
        ("{ }", None),
        ("{ useDHCP = true; }", None),
        ("{ interfaces.enp3s0.useDHCP = true; }", "enp3s0"),
        ("{ interfaces.lan0.useDHCP = true; }", "lan0"),
        ("{ interfaces.eth0.useDHCP = true; }", "eth0"),
        ("{ interfaces = { eno2.useDHCP = true; eno1.useDHCP = null; }; }", "eno2"),
        (f"{{ interfaces = {{ eno1.useDHCP = true; eno2.{STATIC}; }}; }}", "eno2"),
        ("{ firewall.interfaces.eno1.allowedTCPPorts = [ 1 ]; }", "eno1"),
        ('{ firewall.trustedInterfaces = [ "lo" "docker0" "ztabc" ]; }', None),
        # A name that might be anything is not taken for a card because a rule mentions it.
        ("{ firewall.interfaces.mesh7.allowedTCPPorts = [ 1 ]; }", None),
        ("{ wireguard.interfaces.wg0 = { }; firewall.interfaces.wg0 = { }; }", None),
        ('{ nat.externalInterface = "ens3"; }', "ens3"),
        (
            '{ vlans.lan = { id = 5; interface = "enp1s0"; }; interfaces.lan.useDHCP = true; }',
            "enp1s0",
        ),
        (
            '{ interfaces = { "en*".useDHCP = true; a-name-too-long-for-linux.useDHCP = true; }; }',
            None,
        ),
        ("{ interfaces.tap5 = { virtual = true; useDHCP = true; }; }", None),
    ],
)
def test_the_interface_that_a_configuration_expects(networking: str, name: str | None) -> None:
    found = evaluate(f"(import (modules + /interface.nix)).find {{ networking = {networking}; }}")
    assert (found and found["name"]) == name


@needs_nix
def test_a_bridge_has_the_address_of_the_card_in_it() -> None:
    found = evaluate(
        f"""(import (modules + /interface.nix)).find {{ networking = {{
          bridges.br0.interfaces = [ "enp3s0" ];
          interfaces = {{ br0.{STATIC}; enp3s0.useDHCP = false; }};
          defaultGateway = {{ address = "10.1.0.1"; interface = "br0"; }};
        }}; }}"""
    )
    assert found == {
        "name": "enp3s0",
        "address": "10.1.0.2",
        "prefixLength": 16,
        "gateway": "10.1.0.1",
        "others": [],
    }


@needs_nix
def test_networkd() -> None:
    found = evaluate(
        """(import (modules + /interface.nix)).find { systemd.network = {
          enable = true;
          netdevs."10-br".netdevConfig.Name = "lan";
          networks = {
            "10-wan" = {
              matchConfig.Name = "enp1s0"; address = [ "fd00::2/64" "192.0.2.7/24" ];
              routes = [
                { Destination = "10.0.0.0/8"; routeConfig = throw "gone"; }
                { Gateway = "192.0.2.1"; }
              ];
            };
            "15-broken" = throw "no";
            "20-lan" = { matchConfig.Name = "lan"; networkConfig.Address = "10.0.0.1/8"; };
            "30-any" = { matchConfig.Name = "en* eth*"; DHCP = "yes"; };
          };
        }; }"""
    )
    assert (found["name"], found["address"]) == ("enp1s0", "192.0.2.7")
    assert (found["prefixLength"], found["gateway"]) == (24, "192.0.2.1")


@needs_nix
def test_eth0_gets_that_name_and_only_then_is_something_changed() -> None:
    overrides = "(import (modules + /interface.nix)).overrides"
    [entry] = evaluate(f"{overrides} {{ networking.interfaces.enp3s0.{STATIC}; }}")
    assert entry["option"] == ["services", "udev", "extraRules"]
    assert entry["merge"] is True
    assert 'KERNEL=="eth0", NAME="enp3s0"' in entry["value"]
    assert evaluate(f"{overrides} {{ networking.interfaces.eth0.{STATIC}; }}") == []
    assert evaluate(f"{overrides} {{ networking.useDHCP = true; }}") == []
