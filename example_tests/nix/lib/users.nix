# The people of the household: accounts that physical machines and VMs share.
# A machine's main user is `userConfig` in its modules.
rec {
  alice = {
    username = "alice";
    description = "Alice Example";
    extraGroups = [ "wheel" ];
    # Whole lines of ~/.ssh/id_ed25519.pub
    authorizedKeys = [ ];
    # What `mkpasswd` prints; null: no password opens the account.
    hashedPassword = null;
  };

  bob = {
    username = "bob";
    description = "Bob Example";
    extraGroups = [ ];
    authorizedKeys = [ ];
    hashedPassword = null;
  };

  # Who has an account on the physical machines, and whose they are.
  household = [
    alice
    bob
  ];
  owner = alice;

  # Who uses a VM when nothing else is said: Alice, with a password that anybody may know.
  # It is "opensesame" (made with `mkpasswd -m sha-512`): good for a VM, never for a real machine.
  vmUser = alice // {
    hashedPassword = "$6$nixvmExample$Rio5OwMyhzhVBCmouY7htPZ2xkKL.Qf5Hdz.XcaSKQbXM/yaFhx1AfVHyFG4D2usD2x/C617roDo5NSX6Crlx0";
  };
}
