"""From a flake reference to a built VM. Knows no QEMU and no pytest."""
