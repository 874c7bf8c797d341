"""The stand-in's boot loader and its network: what stands for GRUB, and for NixOS's network units.

On real nixpkgs these would test nixpkgs.
"""

from __future__ import annotations

from pytest_nixvm import Machine

PROFILE = "/nix/var/nix/profiles/system"


def read(vm: Machine, link: str) -> str:
    return vm.succeed(f"readlink -f {link}").strip()


def test_grub_boots_what_was_switched_to(booted) -> None:
    with booted("standin_boot", "first") as vm:
        first = read(vm, "/run/booted-system")
        assert read(vm, PROFILE) == first
        assert vm.succeed("findmnt -no SOURCE /").strip() == "/dev/vda1"
        assert "BOOT_IMAGE=" in vm.succeed("cat /proc/cmdline")
        assert "NixOS Stage 1" in vm.get_console_log()  # as configured

        (second,) = set(vm.succeed("ls -d /nix/store/*-nixos-system-*").split()) - {first}
        vm.succeed(f"nix-env -p {PROFILE} --set {second}")
        vm.succeed(f"{second}/bin/switch-to-configuration boot 2>&1")
        assert read(vm, "/run/current-system") == first
        vm.reboot()
        assert read(vm, "/run/booted-system") == read(vm, "/run/current-system") == second
        assert "second=yes" in vm.succeed("cat /proc/cmdline")
        assert vm.succeed("hello") == "Hello, world!\n"  # its packages, from a store on the disk

        vm.succeed(f"nix-env -p {PROFILE} --rollback")
        vm.succeed(f"{PROFILE}/bin/switch-to-configuration boot 2>&1")
        menu = vm.succeed("cat /boot/grub/grub.cfg")
        assert menu.index(f"init={first}/init") < menu.index(f"init={second}/init")
        assert menu.count("menuentry") == 3  # what boots, and the two generations
        vm.kill()  # the menu is on the disk
        vm.start()
        assert read(vm, "/run/booted-system") == first


def test_a_fixed_address_on_a_card_with_its_own_name(booted) -> None:
    with booted("standin_boot", "fixed") as vm:
        assert vm.succeed("ls /sys/class/net").split() == ["enp3s0", "lo"]
        vm.wait_for_unit("network-setup.service")
        assert "inet 10.0.2.15/24" in vm.succeed("ip -4 addr show enp3s0")
        assert "default via 10.0.2.2 dev enp3s0" in vm.succeed("ip route")
        assert vm.succeed("cat /etc/resolv.conf") == "nameserver 10.0.2.3\n"
        assert 'iifname "enp3s0" tcp dport 8080 accept' in vm.succeed("nft list ruleset")
        vm.fail("systemctl is-active dhcpcd")
        assert vm.ssh.run("hostname", check=True).stdout == "fixed\n"


def test_dhcp_on_a_card_with_its_own_name(booted) -> None:
    with booted("standin_boot", "asking") as vm:
        vm.wait_until_succeeds("ip -4 addr show enp3s0 | grep 10.0.2.15", timeout=60)
        assert vm.ssh.run("hostname", check=True).stdout == "asking\n"
