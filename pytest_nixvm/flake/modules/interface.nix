# The name that the configuration expects its network interface to have.
#
# In a VM build qemu-vm.nix turns predictable names off, so the interface is eth0; a configuration
# for a real machine says `networking.interfaces.enp3s0` or `firewall.interfaces.enp3s0`, which then
# would apply to nothing, silently. What is named here is what QEMU's one interface is called.
let
  inherit (builtins)
    attrNames attrValues concatLists concatMap elem elemAt filter head isAttrs isList isString map match stringLength tail
    tryEval;

  # What can't be evaluated is as if it were not there: the build itself will say so.
  attempt = default: value:
    let tried = tryEval (builtins.deepSeq value value); in if tried.success then tried.value else default;
  names = set: if isAttrs set then attrNames set else [ ];
  values = set: if isAttrs set then attrValues set else [ ];
  list = value: if value == null then [ ] else if isList value then value else [ value ];
  unique = builtins.foldl' (seen: name: if elem name seen then seen else seen ++ [ name ]) [ ];

  # A name, not a pattern; Linux allows 15 characters.
  isPlain = name: isString name && stringLength name < 16 && match "[A-Za-z0-9_.-]+" name != null;

  # Interfaces that no hardware makes, and that no option below declares either.
  isVirtual = name:
    name == "lo" || match
      "(docker|podman|cni|veth|ve-|vb-|vz-|virbr|vnet|vmnet|vboxnet|lxcbr|lxdbr|incusbr|br-|br[0-9]|bond|dummy|ifb|wg|tun|tap|ppp|sit|gre|vlan|vxlan|tailscale|zt|wt[0-9]|nebula|mynet|cali|flannel|cilium|waydroid).*"
      name != null;

  # Names as the kernel, systemd and people give them to network cards.
  isUsual = name: match "(en|eth|em|lan|wan|wl|ww|nic|net|uplink|p[0-9]+p).*" name != null;

  # Several options keep interfaces that the configuration itself creates, under their names.
  created = config:
    let
      networking = config.networking or { };
      netdev = n: n.netdevConfig.Name or null;
    in
    unique (filter isString (concatLists [
      (concatMap (option: names (networking.${option} or { })) [
        "bonds" "bridges" "fooOverUDP" "greTunnels" "ipips" "ipvlans" "macvlans" "sits" "vlans" "vswitches"
      ])
      (names (networking.wireguard.interfaces or { }))
      (names (networking.wg-quick.interfaces or { }))
      (filter (name: networking.interfaces.${name}.virtual or false == true) (names (networking.interfaces or { })))
      (map netdev (values (config.systemd.network.netdevs or { })))
    ]));

  # 192.168.1.10/24 → { address; prefixLength; }, null for anything else.
  parsed = text:
    let found = if isString text then match "([0-9]+\\.[0-9]+\\.[0-9]+\\.[0-9]+)/([0-9]+)" text else null; in
    if found == null then null
    else { address = elemAt found 0; prefixLength = builtins.fromJSON (elemAt found 1); };

  isDhcp = value: elem value [ true "yes" "true" "ipv4" "ipv6" "both" "v4" ];

  # What networkd's units say, one entry for each interface that one of them names.
  networkd = config: concatMap
    (network: attempt [ ] (
      let
        section = network.networkConfig or { };
        addresses = list (network.address or [ ]) ++ list (section.Address or null)
          ++ map (a: a.Address or (attempt null (a.addressConfig.Address or null))) (list (network.addresses or [ ]));
        gateways = list (network.gateway or [ ]) ++ list (section.Gateway or null)
          # The inner set is what nixpkgs had up to 24.05; it throws where it is gone.
          ++ map (r: r.Gateway or (attempt null (r.routeConfig.Gateway or null))) (list (network.routes or [ ]));
        plain = filter isPlain (concatMap words (list (network.matchConfig.Name or (network.name or null))));
      in
      map
        (name: {
          inherit name;
          addresses = filter (a: a != null) (map parsed addresses);
          dhcp = if network ? DHCP && network.DHCP != null then isDhcp network.DHCP
            else if section ? DHCP then isDhcp section.DHCP else null;
          gateways = filter isString gateways;
        })
        plain))
    (if (config.systemd.network.enable or false) == true then values (config.systemd.network.networks or { }) else [ ]);
  words = text: if isString text then filter (w: isString w && w != "") (builtins.split " +" text) else [ ];

  scripted = config: map
    (name:
      let interface = config.networking.interfaces.${name}; in {
        name = if isString (interface.name or null) then interface.name else name;
        addresses = map (a: { inherit (a) address prefixLength; }) (interface.ipv4.addresses or [ ]);
        dhcp = interface.useDHCP or null;
        gateways = [ ];
      })
    (names (config.networking.interfaces or { }));

  # Both ways' entries of one interface in one.
  declared = config:
    let
      # One by one: an interface that throws does not hide the others.
      each = entries: concatMap (entry: list (attempt null entry)) (let tried = tryEval entries; in if tried.success then tried.value else [ ]);
      every = each (scripted config) ++ each (networkd config);
      of = name: filter (entry: entry.name == name) every;
      dhcps = name: filter (value: value != null) (map (entry: entry.dhcp) (of name));
    in
    map
      (name: {
        inherit name;
        addresses = unique (concatMap (entry: entry.addresses) (of name));
        dhcp = if dhcps name == [ ] then null else elem true (dhcps name);
        gateways = concatMap (entry: entry.gateways) (of name);
      })
      (unique (map (entry: entry.name) every));

  gateway = config:
    let value = attempt null (config.networking.defaultGateway or null); in
    if isString value then { address = value; interface = null; }
    else if isAttrs value then { address = value.address or null; interface = value.interface or null; }
    else { address = null; interface = null; };

  # bridge or bond → what it is made of.
  members = config:
    let
      made = option: map
        (name: { inherit name; interfaces = list (config.networking.${option}.${name}.interfaces or [ ]); })
        (names (config.networking.${option} or { }));
    in
    made "bridges" ++ made "bonds";
  parents = config: concatMap (v: list (v.interface or null))
    (values (config.networking.vlans or { }) ++ values (config.networking.macvlans or { }));

  # Every interface that must come from hardware, the one that matters most first.
  physical = config:
    let
      ours = attempt [ ] (created config);
      known = declared config;
      bundles = attempt [ ] (members config);
      inBundles = concatMap (b: b.interfaces) bundles;
      named = concatLists [
        (map (i: i.name) (filter (i: i.addresses != [ ]) known))
        (list (gateway config).interface)
        (map (i: i.name) (filter (i: i.dhcp == true) known))
        (filter (name: !(isVirtual name)) inBundles)
        (attempt [ ] (parents config))
        (attempt [ ] (list (config.networking.nat.externalInterface or null)))
        # These two only refer to an interface, which may be anybody's.
        (filter isUsual (attempt [ ] (names (config.networking.firewall.interfaces or { }))))
        (filter isUsual (attempt [ ] (list (config.networking.firewall.trustedInterfaces or null))))
        (map (i: i.name) known)
      ];
      isHardware = name:
        isPlain name && !(elem name ours)
        # A static address is never for a guess: the option `interfaces` may name anything.
        && (!(isVirtual name) || elem name (map (i: i.name) (filter (i: i.addresses != [ ]) known)) && name != "lo");
    in
    unique (filter isHardware named);

  find = config:
    let
      candidates = physical config;
      name = head candidates;
      known = declared config;
      under = map (b: b.name) (filter (b: elem name b.interfaces) (attempt [ ] (members config)));
      mine = filter (i: elem i.name ([ name ] ++ under)) known;
      addresses = concatMap (i: i.addresses) mine;
      routers = list (gateway config).address ++ concatMap (i: i.gateways) mine;
    in
    if candidates == [ ] then null
    else {
      inherit name;
      address = if addresses == [ ] then null else (head addresses).address;
      prefixLength = if addresses == [ ] then null else (head addresses).prefixLength;
      gateway = if routers == [ ] then null else head routers;
      others = tail candidates;
    };
in
{
  inherit declared find gateway;

  overrides = config:
    let found = find config; in
    if found == null || found.name == "eth0" then [ ]
    else [
      {
        option = [ "services" "udev" "extraRules" ];
        # As nixos/lib/testing/network.nix does it. The `add` comes again when stage 2 begins.
        value = ''
          SUBSYSTEM=="net", ACTION=="add", KERNEL=="eth0", NAME="${found.name}"
        '';
        merge = true;
        shown = "… eth0 is called ${found.name}";
        reason = "the machine's own name for it, so that its addresses and firewall rules apply";
      }
    ];
}
