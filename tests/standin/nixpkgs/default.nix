{ system ? builtins.currentSystem, overlays ? [ ], config ? { }, ... }@args:
import ./pkgs { lib = import ./lib; inherit system overlays; }
