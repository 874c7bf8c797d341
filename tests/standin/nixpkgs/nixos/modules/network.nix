# networking.*: the name, DHCP on the interfaces, and the firewall (nftables, loaded by firewall.service).
{ lib, config, pkgs, ... }:
let
  inherit (lib) mkOption types mkIf mkEnableOption;
  cfg = config.networking;
  fw = cfg.firewall;
  ports = mkOption { type = types.listOf types.port; default = [ ]; };
  ranges = mkOption { type = types.listOf (types.attrsOf types.port); default = [ ]; };
  interface.options = {
    allowedTCPPorts = ports;
    allowedUDPPorts = ports;
    allowedTCPPortRanges = ranges;
    allowedUDPPortRanges = ranges;
  };
  addresses = longest: mkOption {
    type = types.listOf (types.submodule { options = {
      address = mkOption { type = types.str; };
      prefixLength = mkOption { type = types.ints.between 0 longest; };
    }; });
    default = [ ];
  };
  accepted = name: mkOption {
    type = types.submodule {
      freeformType = types.attrsOf types.anything;
      options.enable = mkEnableOption name;
    };
    default = { };
  };
  open = prefix: f:
    let rule = proto: single: range:
      let all = map toString single ++ map (r: "${toString r.from}-${toString r.to}") range;
      in lib.optional (all != [ ]) "${prefix}${proto} dport { ${lib.concatStringsSep ", " (lib.unique all)} } accept";
    in rule "tcp" f.allowedTCPPorts f.allowedTCPPortRanges ++ rule "udp" f.allowedUDPPorts f.allowedUDPPortRanges;
  rules = lib.concatLists [
    [ "ct state { established, related } accept" "ct state invalid drop" ]
    (map (i: ''iifname "${i}" accept'') ([ "lo" ] ++ fw.trustedInterfaces))
    (open "" fw)
    (lib.concatLists (lib.mapAttrsToList (n: open ''iifname "${n}" '') fw.interfaces))
    (lib.optional fw.allowPing "icmp type echo-request accept")
    [
      "icmpv6 type != { nd-redirect, 139 } accept" "udp sport 67 udp dport 68 accept"
      "ip6 daddr fe80::/64 udp dport 546 accept"
    ]
    (lib.optional (fw.extraInputRules != "") fw.extraInputRules)
    (lib.optional fw.rejectPackets "reject with icmpx port-unreachable")
  ];
  ruleset = pkgs.writeText "firewall.nft" ''
    table inet nixos-fw
    delete table inet nixos-fw
    table inet nixos-fw {
      chain input {
        type filter hook input priority filter; policy drop;
        ${lib.concatStringsSep "\n    " rules}
      }
    }
  '';
  interfaces = lib.mapAttrsToList (name: i: i // { inherit name; }) cfg.interfaces;
  static = lib.filter (i: i.ipv4.addresses ++ i.ipv6.addresses != [ ]) interfaces;
  # Which interfaces ask for an address: with `useDHCP` all but those that have one, else those that are said to.
  noDHCP = lib.filter (i: if i.useDHCP != null then !i.useDHCP else i.ipv4.addresses != [ ]) interfaces;
  withDHCP = lib.filter (i: i.useDHCP == true) interfaces;
  namesOf = lib.concatMapStringsSep " " (i: i.name);
  gateway = if lib.isString cfg.defaultGateway then { address = cfg.defaultGateway; } else cfg.defaultGateway;
  # A name in the name of a unit.
  escaped = lib.replaceStrings [ "-" ] [ "\\x2d" ];
in {
  options.networking = {
    hostName = mkOption {
      type = types.strMatching "^$|^[[:alnum:]]([[:alnum:]_-]{0,61}[[:alnum:]])?$";
      default = "nixos";
    };
    domain = mkOption { type = types.nullOr types.str; default = null; };
    fqdn = mkOption {
      type = types.str;
      default = if cfg.domain == null then cfg.hostName else "${cfg.hostName}.${cfg.domain}";
    };
    hostId = mkOption { type = types.nullOr types.str; default = null; };
    useDHCP = mkOption { type = types.bool; default = true; };
    usePredictableInterfaceNames = mkOption { type = types.bool; default = true; };
    useNetworkd = mkOption { type = types.bool; default = false; };
    enableIPv6 = mkOption { type = types.bool; default = true; };
    nameservers = mkOption { type = types.listOf types.str; default = [ ]; };
    extraHosts = mkOption { type = types.lines; default = ""; };
    hosts = mkOption { type = types.attrsOf (types.listOf types.str); default = { }; };
    defaultGateway = mkOption {
      type = types.nullOr (types.either types.str (types.attrsOf types.anything));
      default = null;
    };
    interfaces = mkOption {
      default = { };
      type = types.attrsOf (types.submodule {
        options = {
          useDHCP = mkOption { type = types.nullOr types.bool; default = null; };
          mtu = mkOption { type = types.nullOr types.int; default = null; };
          macAddress = mkOption { type = types.nullOr types.str; default = null; };
          wakeOnLan = mkOption { type = types.attrsOf types.anything; default = { }; };
          ipv4.addresses = addresses 32;
          ipv6.addresses = addresses 128;
        };
      });
    };
    networkmanager = accepted "NetworkManager";
    wireless = accepted "wpa_supplicant";
    nftables = accepted "nftables";
    firewall = interface.options // {
      enable = mkOption { type = types.bool; default = true; };
      allowPing = mkOption { type = types.bool; default = true; };
      rejectPackets = mkOption { type = types.bool; default = false; };
      logRefusedConnections = mkOption { type = types.bool; default = true; };
      logRefusedPackets = mkOption { type = types.bool; default = false; };
      checkReversePath = mkOption {
        type = types.either types.bool (types.enum [ "strict" "loose" ]);
        default = true;
      };
      # Commands for iptables, which is not here.
      extraCommands = mkOption { type = types.lines; default = ""; };
      extraStopCommands = mkOption { type = types.lines; default = ""; };
      extraInputRules = mkOption { type = types.lines; default = ""; };
      extraPackages = mkOption { type = types.listOf types.package; default = [ ]; };
      filterForward = mkOption { type = types.bool; default = false; };
      logReversePathDrops = mkOption { type = types.bool; default = false; };
      pingLimit = mkOption { type = types.nullOr types.str; default = null; };
      trustedInterfaces = mkOption { type = types.listOf types.str; default = [ ]; };
      interfaces = mkOption { type = types.attrsOf (types.submodule interface); default = { }; };
    };
  };

  config = {
    boot.kernelParams = mkIf (!cfg.usePredictableInterfaceNames) [ "net.ifnames=0" ];
    environment.systemPackages = mkIf fw.enable [ pkgs.nftables ];
    boot.kernel.sysctl."net.ipv6.conf.all.disable_ipv6" = mkIf (!cfg.enableIPv6) 1;
    environment.etc = {
      hostname.text = cfg.hostName + "\n";
      hosts.text = lib.concatLines ([
        "127.0.0.1 localhost"
        "::1 localhost"
        "127.0.0.2 ${lib.optionalString (cfg.domain != null) "${cfg.fqdn} "}${cfg.hostName}"
      ] ++ lib.mapAttrsToList (ip: names: "${ip} ${lib.concatStringsSep " " names}") cfg.hosts) + cfg.extraHosts;
      "nsswitch.conf".text = ''
        passwd: files systemd
        group: files systemd
        shadow: files
        hosts: files dns
        networks: files
        services: files
        protocols: files
      '';
    };
    systemd.services = lib.listToAttrs (map (i: {
      name = "network-addresses-${i.name}";
      value = rec {
        description = "Address configuration of ${i.name}";
        wantedBy = [ "network-setup.service" "network.target" ];
        before = wantedBy;
        # The name is there when udev has given it.
        bindsTo = [ "sys-subsystem-net-devices-${escaped i.name}.device" ];
        after = bindsTo ++ [ "network-pre.target" ];
        stopIfChanged = false;
        path = [ pkgs.iproute2 ];
        serviceConfig = { Type = "oneshot"; RemainAfterExit = true; };
        script = lib.concatMapStrings (a: ''
          ip addr replace ${a.address}/${toString a.prefixLength} dev ${i.name}
        '') (i.ipv4.addresses ++ i.ipv6.addresses) + "ip link set ${i.name} up\n";
        preStop = lib.concatMapStrings (a: ''
          ip addr del ${a.address}/${toString a.prefixLength} dev ${i.name} || true
        '') (i.ipv4.addresses ++ i.ipv6.addresses);
      };
    }) static) // {
      dhcpcd = mkIf (cfg.useDHCP || withDHCP != [ ]) {
        description = "DHCP Client";
        wantedBy = [ "multi-user.target" ];
        wants = [ "network.target" ];
        before = [ "network-online.target" ];
        after = [ "systemd-modules-load.service" ];
        unitConfig.ConditionPathExistsGlob = "/sys/class/net/*/device";
        environment = {
          NEVER = namesOf noDHCP;
          WANTED = if cfg.useDHCP then "" else namesOf withDHCP;
        };
        # busybox's client, under the name of NixOS's: one process, and in the background once it has an address.
        serviceConfig = {
          Type = "forking";
          ExecStart = "/bin/busybox sh ${./network-dhcp.sh} ${./udhcpc.sh}";
          Restart = "on-failure";
        };
      };
      network-setup = mkIf (gateway != null || cfg.nameservers != [ ] || static != [ ]) {
        description = "Networking Setup";
        wantedBy = [ "network.target" "multi-user.target" ];
        before = [ "network.target" ];
        after = [ "network-pre.target" ];
        stopIfChanged = false;
        path = [ pkgs.iproute2 ];
        serviceConfig = { Type = "oneshot"; RemainAfterExit = true; };
        script = lib.optionalString (gateway != null) ''
          ip route replace default via ${gateway.address} ${
            lib.optionalString (gateway.interface or null != null) "dev ${gateway.interface}"}
        '' + lib.optionalString (cfg.nameservers != [ ]) ''
          for server in ${toString cfg.nameservers}; do echo "nameserver $server"; done > /etc/resolv.conf
        '';
      };
      firewall = mkIf fw.enable {
        description = "Firewall";
        wantedBy = [ "sysinit.target" ];
        wants = [ "network-pre.target" ];
        before = [ "network-pre.target" "shutdown.target" ];
        after = [ "systemd-modules-load.service" ];
        conflicts = [ "shutdown.target" ];
        unitConfig.DefaultDependencies = false;
        serviceConfig = {
          Type = "oneshot";
          RemainAfterExit = true;
          ExecStart = "/usr/sbin/nft -f ${ruleset}";
          ExecReload = "/usr/sbin/nft -f ${ruleset}";
          ExecStop = "/usr/sbin/nft delete table inet nixos-fw";
        };
      };
    };
  };
}
