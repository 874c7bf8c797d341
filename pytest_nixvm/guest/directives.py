"""systemd's directives, as far as people write them: to tell what a mistyped one was meant to be.

Names from systemd.unit(5), .service(5), .exec(5), .kill(5), .resource-control(5), .socket(5),
.timer(5), .path(5), .mount(5), .network(5). A name that is missing here costs a hint, no more.
"""

from __future__ import annotations

import difflib

_UNIT = """
After Before Requires Requisite Wants BindsTo PartOf Upholds Conflicts OnFailure OnSuccess
Description Documentation DefaultDependencies StopWhenUnneeded RefuseManualStart RefuseManualStop
RequiresMountsFor WantsMountsFor PropagatesReloadTo ReloadPropagatedFrom JoinsNamespaceOf
StartLimitIntervalSec StartLimitBurst StartLimitAction JobTimeoutSec IgnoreOnIsolate SourcePath
ConditionPathExists ConditionPathIsDirectory ConditionFileNotEmpty ConditionVirtualization
ConditionKernelCommandLine ConditionUser ConditionHost ConditionACPower ConditionArchitecture
ConditionDirectoryNotEmpty ConditionPathIsMountPoint ConditionSecurity ConditionFirstBoot
AssertPathExists CollectMode FailureAction SuccessAction AllowIsolate
"""
_INSTALL = "WantedBy RequiredBy UpheldBy Alias Also DefaultInstance"
_EXEC = """
User Group SupplementaryGroups DynamicUser WorkingDirectory RootDirectory Environment
EnvironmentFile PassEnvironment UnsetEnvironment StandardInput StandardOutput StandardError
SyslogIdentifier UMask Nice OOMScoreAdjust CPUSchedulingPolicy IOSchedulingClass LimitNOFILE
LimitCORE LimitMEMLOCK LimitNPROC LimitAS PAMName TTYPath CapabilityBoundingSet AmbientCapabilities
NoNewPrivileges SecureBits ProtectSystem ProtectHome ProtectKernelTunables ProtectKernelModules
ProtectKernelLogs ProtectControlGroups ProtectClock ProtectHostname ProtectProc ProcSubset
PrivateTmp PrivateDevices PrivateNetwork PrivateUsers PrivateMounts PrivateIPC
RestrictAddressFamilies RestrictNamespaces RestrictRealtime RestrictSUIDSGID LockPersonality
MemoryDenyWriteExecute SystemCallFilter SystemCallArchitectures SystemCallErrorNumber
ReadWritePaths ReadOnlyPaths InaccessiblePaths ExecPaths NoExecPaths BindPaths BindReadOnlyPaths
TemporaryFileSystem StateDirectory StateDirectoryMode CacheDirectory LogsDirectory
RuntimeDirectory RuntimeDirectoryMode RuntimeDirectoryPreserve ConfigurationDirectory
LoadCredential LoadCredentialEncrypted SetCredential ImportCredential RemoveIPC KeyringMode
IgnoreSIGPIPE LogLevelMax LogRateLimitIntervalSec MountFlags NetworkNamespacePath
KillMode KillSignal SendSIGKILL SendSIGHUP FinalKillSignal RestartKillSignal
Slice Delegate CPUQuota CPUWeight CPUAccounting MemoryMax MemoryHigh MemoryMin MemoryLow
MemorySwapMax MemoryAccounting TasksMax TasksAccounting IOWeight IOAccounting IPAccounting
IPAddressAllow IPAddressDeny DeviceAllow DevicePolicy ManagedOOMSwap ManagedOOMMemoryPressure
AllowedCPUs SocketBindAllow SocketBindDeny
"""
_SERVICE = """
Type ExecStart ExecStartPre ExecStartPost ExecCondition ExecReload ExecStop ExecStopPost Restart
RestartSec RestartSteps RestartMaxDelaySec RemainAfterExit PIDFile BusName GuessMainPID
TimeoutStartSec TimeoutStopSec TimeoutSec TimeoutAbortSec RuntimeMaxSec WatchdogSec
SuccessExitStatus RestartPreventExitStatus RestartForceExitStatus NotifyAccess Sockets
FileDescriptorStoreMax OOMPolicy ExitType RootDirectoryStartOnly NonBlocking OpenFile
"""
_SOCKET = """
ListenStream ListenDatagram ListenSequentialPacket ListenFIFO ListenNetlink Accept BindIPv6Only
Backlog SocketUser SocketGroup SocketMode DirectoryMode MaxConnections MaxConnectionsPerSource
KeepAlive FreeBind Transparent ReusePort Service RemoveOnStop Symlinks FileDescriptorName NoDelay
BindToDevice ExecStartPre ExecStartPost ExecStopPre ExecStopPost TimeoutSec TriggerLimitBurst
"""
_TIMER = """
OnActiveSec OnBootSec OnStartupSec OnUnitActiveSec OnUnitInactiveSec OnCalendar AccuracySec
RandomizedDelaySec FixedRandomDelay Persistent WakeSystem RemainAfterElapse Unit OnClockChange
OnTimezoneChange
"""
_PATH = """
PathExists PathExistsGlob PathChanged PathModified DirectoryNotEmpty Unit MakeDirectory
DirectoryMode TriggerLimitBurst
"""
_MOUNT = (
    "What Where Type Options SloppyOptions LazyUnmount ReadWriteOnly ForceUnmount DirectoryMode "
    "TimeoutSec"
)
_NETWORK = """
DHCP Address Gateway DNS Domains NTP IPForward IPv4Forwarding IPMasquerade IPv6AcceptRA LLDP LLMNR
MulticastDNS LinkLocalAddressing ConfigureWithoutCarrier Bridge Bond VLAN Description DNSOverTLS
DNSSEC IPv6PrivacyExtensions KeepConfiguration DHCPServer
"""

SECTIONS = {
    "Unit": _UNIT.split(),
    "Install": _INSTALL.split(),
    "Service": (_SERVICE + _EXEC).split(),
    "Socket": (_SOCKET + _EXEC).split(),
    "Timer": _TIMER.split(),
    "Path": _PATH.split(),
    "Mount": (_MOUNT + _EXEC).split(),
    "Automount": ["Where", "DirectoryMode", "TimeoutIdleSec", "ExtraOptions"],
    "Network": _NETWORK.split(),
}


def hint(key: str, section: str) -> str:
    """Say what a directive was meant to be, or where it belongs; "" if nobody knows."""
    here = SECTIONS.get(section, [])
    lower = {name.lower(): name for name in here}
    if key.lower() in lower:
        return f"Did you mean {lower[key.lower()]}? Case counts."
    homes = [other for other, names in SECTIONS.items() if other != section and key in names]
    if homes:
        wanted = next((home for home in ("Unit", "Service", "Install") if home in homes), homes[0])
        return f"{key} belongs into [{wanted}]."
    near = difflib.get_close_matches(key, here, 1, cutoff=0.75)
    return f"Did you mean {near[0]}?" if near else ""
