# The people of the household. A machine gets one of them as `userConfig`.
rec {
  alice = {
    username = "alice";
    description = "Alice Example";
    extraGroups = [ "wheel" ];
    authorizedKeys = [ ];
    hashedPassword = null;
  };

  # Who uses a VM when nothing else is said: Alice, with a password that anybody may know.
  # It is "opensesame" (made with `mkpasswd -m sha-512`): good for a VM, never for a real machine.
  vmUser = alice // {
    hashedPassword = "$6$nixvmExample$Rio5OwMyhzhVBCmouY7htPZ2xkKL.Qf5Hdz.XcaSKQbXM/yaFhx1AfVHyFG4D2usD2x/C617roDo5NSX6Crlx0";
  };
}
