{ system ? builtins.currentSystem, overlays ? [ ], ... }:
import ./pkgs { lib = import ./lib; inherit system overlays; }
