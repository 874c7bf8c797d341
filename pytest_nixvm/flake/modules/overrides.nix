# What the plugin changes in a machine's configuration: as little as possible, and only where
# the user's own value differs. What QEMU's arguments can do (memory, ports, devices, no window)
# is not here. Every entry that takes effect is shown to the user, with its reason.
[
  {
    option = [ "services" "qemuGuest" "enable" ];
    value = true;
    reason = "the guest agent tells when the machine is ready, and lets the tests in";
  }
]
