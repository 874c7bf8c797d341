# Kernel modules of the guest besides those of stage 1.
[
  # network: the firewall, and what a configuration may set up
  "nf_tables" "nft_ct" "nft_reject_inet" "nft_reject_ipv4" "nft_reject_ipv6" "nft_log" "nft_limit" "nft_nat"
  "nft_masq" "nft_redir" "nft_fib_inet"
  "nft_chain_nat" "nft_counter" "nf_conntrack" "nf_log_syslog"
  "bridge" "veth" "dummy" "tun" "8021q" "bonding" "wireguard" "vxlan" "macvlan" "af_packet" "ipv6" "unix_diag"
  "inet_diag" "tcp_diag" "udp_diag" "netlink_diag"
  # file systems and disks
  "squashfs" "isofs" "vfat" "nls_cp437" "nls_iso8859-1" "nls_ascii" "nls_utf8" "loop" "virtiofs" "fuse" "btrfs"
  "xfs" "dm_mod" "dm_crypt" "zram"
  "virtio_scsi" "sd_mod" "nvme"
  # devices of QEMU; not those that every VM has and none here needs (IDE, USB, the display as a frame buffer):
  # probing them takes up to a second each
  "virtio_balloon" "virtio_gpu" "virtio_input" "vmw_vsock_virtio_transport" "pvpanic-pci" "qemu_fw_cfg" "e1000"
  "e1000e" "i6300esb" "tpm_tis"
  "serio_raw" "efivarfs" "configfs" "binfmt_misc"
]
