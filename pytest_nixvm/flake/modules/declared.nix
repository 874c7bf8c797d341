# What a configuration declares, as plain data: what the checks compare a running machine with, and
# what the fidelity section needs. `vm` is the VM's configuration, `real` the machine's own; they
# differ in what qemu-vm.nix replaces.
#
# Every value survives an option that this nixpkgs does not have, and one that can't be evaluated.
{ real, vm }:
let
  inherit (builtins)
    any attrNames attrValues elem filter isAttrs isInt isList length listToAttrs map
    tryEval unsafeDiscardStringContext;

  attempt = default: value:
    let tried = tryEval (builtins.deepSeq value value); in if tried.success then tried.value else default;
  text = value: if value == null then "" else unsafeDiscardStringContext "${toString value}";
  list = value: if isList value then value else if value == null then [ ] else [ value ];
  names = set: attempt [ ] (if isAttrs set then attrNames set else [ ]);
  values = set: if isAttrs set then attrValues set else [ ];
  bool = value: attempt false (value == true);
  # The entries that can be evaluated.
  each = f: items: filter (v: v != null) (map (item: attempt null (f item)) (attempt' items));
  # Only as far as the list: its items are tried one by one.
  attempt' = items: let tried = tryEval items; in if tried.success then list tried.value else [ ];

  interface = import ./interface.nix;
  secrets = import ./secrets.nix;

  ports = rules: protocol:
    attempt [ ] (map (port: [ port port ]) (list (rules."allowed${protocol}Ports" or [ ])))
    ++ attempt [ ] (map (range: [ range.from range.to ]) (list (rules."allowed${protocol}PortRanges" or [ ])));
  perInterface = protocol: rules: attempt { } (listToAttrs (filter (entry: entry.value != [ ]) (map
    (name: { inherit name; value = ports rules.${name} protocol; })
    (names rules))));
  firewall = let rules = vm.networking.firewall or { }; in {
    enabled = bool (rules.enable or false);
    tcp = ports rules "TCP";
    udp = ports rules "UDP";
    interfaceTcp = perInterface "TCP" (rules.interfaces or { });
    interfaceUdp = perInterface "UDP" (rules.interfaces or { });
    trusted = attempt [ ] (map text (list (rules.trustedInterfaces or [ ])));
    ping = bool (rules.allowPing or true);
    # Rules in the firewall's own language: what they open can't be told.
    ownRules = any (option: attempt "" (text (rules.${option} or "")) != "")
      [ "extraCommands" "extraInputRules" ];
  };

  isDerivation = value: isAttrs value && value.type or null == "derivation";
  shell = value:
    if isDerivation value && value ? shellPath then "/run/current-system/sw${value.shellPath}" else text value;
  user = key: u:
    let given = option: u.${option} or null != null; in {
      name = text (u.name or key);
      normal = u.isNormalUser or false;
      shell = attempt "" (shell (u.shell or null));
      home = attempt "" (text (u.home or ""));
      # In the order in which NixOS prefers them.
      password =
        if given "hashedPasswordFile" || given "passwordFile" then "file"
        else if given "hashedPassword" || given "initialHashedPassword" then "hashed"
        else if given "password" || given "initialPassword" then "plain"
        else "none";
      hashed = attempt null (
        if given "hashedPassword" then text u.hashedPassword
        else if given "initialHashedPassword" then text u.initialHashedPassword else null);
      passwordFile = attempt null (
        if given "hashedPasswordFile" then text u.hashedPasswordFile
        else if given "passwordFile" then text u.passwordFile else null);
      keys = attempt 0 (
        length (list (u.openssh.authorizedKeys.keys or [ ])) + length (list (u.openssh.authorizedKeys.keyFiles or [ ])));
    };
  users =
    let
      every = vm.users.users or { };
      enabled = filter (key: bool (every.${key}.enable or true)) (names every);
    in
    filter (u: u.normal || u.name == "root" || u.keys > 0 || u.password != "none")
      (each (key: user key every.${key}) enabled);

  ssh = let sshd = vm.services.openssh or { }; in
    if !(bool (sshd.enable or false)) then null
    else {
      ports = attempt [ 22 ] (filter isInt (list (sshd.ports or [ 22 ])));
      openFirewall = bool (sshd.openFirewall or true);
    };

  loader = real.boot.loader or { };
  bootLoader =
    if bool (real.boot.lanzaboote.enable or false) then "lanzaboote"
    else if bool (loader.systemd-boot.enable or false) then "systemd-boot"
    else if bool (loader.limine.enable or false) then "limine"
    else if bool (loader.refind.enable or false) then "refind"
    else if bool (loader.generic-extlinux-compatible.enable or false) then "extlinux"
    else if bool (loader.raspberryPi.enable or false) then "raspberryPi"
    else if bool (loader.external.enable or false) then "its own"
    # The option is on by default, on machines without a boot loader too.
    else if bool (loader.grub.enable or false) && attempt false (
      text (loader.grub.device or "") != "" || list (loader.grub.devices or [ ]) != [ ] || bool (loader.grub.efiSupport or false)
      || (loader.grub.mirroredBoots or [ ]) != [ ])
    then "GRUB"
    else "";
  timeSync =
    if bool (real.services.chrony.enable or false) then "chrony"
    else if bool (real.services.ntpd-rs.enable or false) then "ntpd-rs"
    else if bool (real.services.ntp.enable or false) then "ntpd"
    else if bool (real.services.openntpd.enable or false) then "openntpd"
    else if bool (real.services.timesyncd.enable or false) then "systemd-timesyncd"
    else "";
  mounts = each
    (fs: {
      mountPoint = text (fs.mountPoint or "");
      fsType = text (fs.fsType or "auto");
      device = text (fs.device or null);
    })
    (filter (fs: bool (fs.enable or true)) (values (real.fileSystems or { })));
in
{
  inherit firewall ssh users;
  hostName = attempt "" (text (vm.networking.hostName or ""));
  switchable = attempt true (vm.system.switch.enable or true);
  homeManager = names (vm.home-manager.users or { });
  # Users with secrets of their own, that Home Manager's units would decrypt.
  homeSecrets = filter
    (user: let home = vm.home-manager.users.${user}; in attempt false (
      attrNames (home.sops.secrets or { }) != [ ] || attrNames (home.age.secrets or { }) != [ ]))
    (names (vm.home-manager.users or { }));
  secrets = attempt [ ] (secrets.find vm [ ]);
  templates = secrets.templates vm;  # sops-nix's: files with secrets in them
  specialisations = names (vm.specialisation or { });
  interfaces = attempt [ ] (map
    (i: { inherit (i) name dhcp; addresses = map (a: [ a.address a.prefixLength ]) i.addresses; })
    (interface.declared vm));
  network = attempt null (interface.find vm);
  gateway = attempt null (interface.gateway vm).address;
  kernelModules = attempt [ ] (map text (list (vm.boot.kernelModules or [ ])));

  real = {
    inherit bootLoader timeSync;
    fileSystems = mounts;
    luks = names (real.boot.initrd.luks.devices or { })
      ++ each (fs: if fs.encrypted.enable or false then text fs.encrypted.label else null) (values (real.fileSystems or { }));
    swap = each (s: text (s.device or "")) (real.swapDevices or [ ]);
    zram = bool (real.zramSwap.enable or false);
    disko = attempt false (any (kind: names (real.disko.devices.${kind} or { }) != [ ]) [ "disk" "lvm_vg" "mdadm" "zpool" "nodev" ]);
    zfs = attempt [ ] (map text (list (real.boot.zfs.extraPools or [ ])));
    persistence = names (real.environment.persistence or { });
    videoDrivers = attempt [ ] (
      if bool (real.services.xserver.enable or false) || bool (real.hardware.graphics.enable or (real.hardware.opengl.enable or false))
      then filter (d: !(elem d [ "modesetting" "fbdev" ])) (map text (list (real.services.xserver.videoDrivers or [ ])))
      else [ ]);
    wireless = bool (real.networking.wireless.enable or false) || bool (real.networking.wireless.iwd.enable or false);
    bluetooth = bool (real.hardware.bluetooth.enable or false);
    tpm2 = bool (real.security.tpm2.enable or false);
    secureBoot = bool (real.boot.lanzaboote.enable or false) || bool (real.boot.loader.limine.secureBoot.enable or false);
    initrdSecrets = names (real.boot.initrd.secrets or { });
    initrdNetwork = bool (real.boot.initrd.network.enable or false);
  };
}
