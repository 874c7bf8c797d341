"""dev-vm is there to develop on: room, and tools."""

import pytest

pytestmark = pytest.mark.nixvm("dev-vm")

GIB = 1024**3


def test_room_to_work(vm):
    memory = int(vm.succeed("awk '/^MemTotal:/ { print $2 }' /proc/meminfo")) * 1024
    disk = int(vm.succeed("lsblk --bytes --nodeps --noheadings --output SIZE /dev/vda"))

    assert memory > 3.5 * GIB  # the kernel keeps a part of the 4 GiB
    assert disk == 20 * GIB


def test_git_commits(vm):
    vm.succeed("git init --quiet /tmp/repo")
    vm.succeed("echo hello > /tmp/repo/file && git -C /tmp/repo add file")
    vm.succeed("git -C /tmp/repo -c user.name=a -c user.email=a@b commit --quiet -m first")

    assert vm.succeed("git -C /tmp/repo log --format=%s") == "first\n"


def test_vim_edits(vm):
    vm.succeed("echo old > /tmp/note && vim -es -c '%s/old/new/' -c 'wq' /tmp/note")

    assert vm.succeed("cat /tmp/note") == "new\n"


def test_the_home_is_as_home_nix_has_it(vm):
    assert vm.succeed("su - alice -c 'git config user.name'") == "Alice Example\n"
