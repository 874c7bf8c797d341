# Nothing boots it: its system is looked at.
{
  vm.guest.virtualbox = true;
  vm.guest.vmware = true;
  system.stateVersion = "25.11";
}
