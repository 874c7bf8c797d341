"""From a start script to a running QEMU under control. Knows no Nix and no pytest."""
