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
  address = { address = mkOption { type = types.str; }; prefixLength = mkOption { type = types.ints.between 0 32; }; };
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
  addresses = lib.filter (i: i.addresses != [ ]) (lib.mapAttrsToList (name: i: {
    inherit name;
    inherit (i.ipv4) addresses;
  }) cfg.interfaces);
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
        options.useDHCP = mkOption { type = types.nullOr types.bool; default = null; };
        options.ipv4.addresses = mkOption { type = types.listOf (types.submodule { options = address; }); default = [ ]; };
      });
    };
    networkmanager.enable = mkEnableOption "NetworkManager";
    wireless.enable = mkEnableOption "wpa_supplicant";
    nftables.enable = mkEnableOption "nftables";
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
    systemd.services.dhcpcd = mkIf (cfg.useDHCP || lib.any (i: i.useDHCP == true) (lib.attrValues cfg.interfaces)) {
      description = "DHCP Client";
      wantedBy = [ "multi-user.target" ];
      wants = [ "network.target" ];
      before = [ "network-online.target" ];
      after = [ "systemd-modules-load.service" ];
      unitConfig.ConditionPathExists = "/sys/class/net/eth0";
      # busybox's client, under the name of NixOS's: one process, and in the background once it has an address.
      serviceConfig = {
        Type = "forking";
        ExecStart = "/bin/busybox udhcpc -i eth0 -b -S -T 1 -t 10 -s ${./udhcpc.sh}";
        Restart = "on-failure";
      };
    };
    systemd.services.network-setup = mkIf (addresses != [ ]) {
      description = "Networking Setup";
      wantedBy = [ "multi-user.target" ];
      before = [ "network.target" ];
      path = [ pkgs.iproute2 ];
      serviceConfig = { Type = "oneshot"; RemainAfterExit = true; };
      script = lib.concatMapStrings (i: lib.concatMapStrings (a: ''
        ip addr replace ${a.address}/${toString a.prefixLength} dev ${i.name}
      '') i.addresses + "ip link set ${i.name} up\n") addresses;
    };
    systemd.services.firewall = mkIf fw.enable {
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
}
