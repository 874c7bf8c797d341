# stdenv.hostPlatform, as far as configurations look at it.
system:
let parts = builtins.match "([^-]+)-([^-]+)" system; cpu = builtins.elemAt parts 0; kernel = builtins.elemAt parts 1; in {
  inherit system;
  config = "${cpu}-unknown-${kernel}-gnu";
  isLinux = kernel == "linux";
  isDarwin = kernel == "darwin";
  isx86_64 = cpu == "x86_64";
  isx86 = cpu == "x86_64";
  isAarch64 = cpu == "aarch64";
  isAarch = cpu == "aarch64";
  is64bit = true;
  is32bit = false;
  parsed = { cpu.name = cpu; kernel.name = kernel; };
}
