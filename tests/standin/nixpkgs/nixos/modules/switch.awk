# What has to happen to the units between two configurations. Read by switch-to-configuration.sh; writes lists for it.
# In, one a line: "old|new NAME" (a unit file in that configuration's /etc/systemd/system), "old-masked|new-masked NAME",
# "old-in|new-in NAME PATH" (a drop-in), "unit NAME ACTIVE SUB" (systemd's, now), "recorded LIST NAME" (from a run that was
# interrupted), "activation NAME" (to be restarted for an activation script). Variables: old, new (directories), fstabs, all.
# Out: "LIST NAME…" sorted, for stop, skip, reload, restart, start; and stop-shown, start-shown without those left unsaid.
# What Debian ships in /usr/lib counts as part of either configuration, as systemd's own units do in NixOS.

BEGIN {
  shipped = "/usr/lib/systemd/system"
  n = split("X-Reload-Triggers Description Documentation OnFailure OnSuccess OnFailureJobMode IgnoreOnIsolate " \
    "StopWhenUnneeded RefuseManualStart RefuseManualStop AllowIsolate CollectMode SourcePath", words, " ")
  for (i = 1; i <= n; i++) ignored[words[i]] = 1
}

$1 == "old" || $1 == "new" { there[$1, $2] = 1; next }
$1 == "old-masked" || $1 == "new-masked" { masked[substr($1, 1, 3), $2] = 1; next }
$1 == "old-in" || $1 == "new-in" { side = substr($1, 1, 3); dropins[side, $2] = dropins[side, $2] $3 "\n"; next }
$1 == "unit" { active[$2] = $3; order[++units] = $2; next }
$1 == "recorded" { put($2, $3); next }
$1 == "activation" { requested[++requests] = $2; next }

END {
  for (i = 1; i <= units; i++) if (active[order[i]] ~ /^(active|activating)$/) consider(order[i])
  if (fstabs) { fstab("/etc/fstab", was); fstab(substr(new, 1, length(new) - 14) "fstab", will); mounts() }
  for (i = 1; i <= requests; i++) {
    if (requested[i] in active) { parse_side("new", requested[i], after); modified(requested[i], after, 1) }
    else put("start", requested[i])
  }
  say("stop"); say("skip"); say("reload"); say("restart"); say("start"); say("stop", "-shown"); say("start", "-shown")
}

function put(list, unit) { lists[list, unit] = 1 }
function take(list, unit) { delete lists[list, unit] }
function has(list, unit) { return (list, unit) in lists }

function readable(file,   line, got) { got = (getline line < file); close(file); return got >= 0 }
function in_lib(name) { if (!(name in lib)) lib[name] = readable(shipped "/" name); return lib[name] }
function concrete(side, unit) { return (side, unit) in there || (side, unit) in masked || in_lib(unit) }
function template_of(unit) { return unit ~ /@/ ? substr(unit, 1, index(unit, "@")) substr(unit, match(unit, /\.[a-z]*$/)) : "" }

# The unit file on one side, "" if there is none or it is masked.
function base(side, unit,   t) {
  if (!concrete("old", unit) && !concrete("new", unit) && (t = template_of(unit)) != "") unit = t
  if ((side, unit) in masked) return ""
  if ((side, unit) in there) return (side == "old" ? old : new) "/" unit
  return in_lib(unit) ? shipped "/" unit : ""
}

# A unit file into data["section|key"] and sections["section"]; an empty value takes back those before.
function parse(file, data, sections,   line, section, at, key, value) {
  section = ""
  while ((getline line < file) > 0) {
    while (line ~ /\\$/ && (getline value < file) > 0) line = substr(line, 1, length(line) - 1) " " value
    sub(/^[ \t]+/, "", line); sub(/[ \t]+$/, "", line)
    if (line == "" || line ~ /^[#;]/) continue
    if (line ~ /^\[.*\]$/) { section = substr(line, 2, length(line) - 2); if (section != "Install") sections[section] = 1; continue }
    at = index(line, "="); if (!at || section == "" || section == "Install") continue
    key = substr(line, 1, at - 1); value = substr(line, at + 1); sub(/[ \t]+$/, "", key); sub(/^[ \t]+/, "", value)
    key = section "|" key
    data[key] = value == "" ? "" : data[key] value "\n"
  }
  close(file)
}

function parse_side(side, unit, data, sections,   file, b, t, i, n, paths) {
  for (i in data) delete data[i]
  for (i in sections) delete sections[i]
  b = base(side, unit); if (b == "") return
  parse(b, data, sections)
  t = b; sub(/.*\//, "", t)
  n = split(dropins[side, t], paths, "\n"); for (i = 1; i < n; i++) parse(paths[i], data, sections)
  if (t != unit) { n = split(dropins[side, unit], paths, "\n"); for (i = 1; i < n; i++) parse(paths[i], data, sections) }
}

function yes(data, key, otherwise,   n, values) {
  if (!(key in data) || data[key] == "") return otherwise
  n = split(data[key], values, "\n")
  return values[n - 1] ~ /^(1|yes|true|on)$/
}

function consider(unit,   b, before, after, s1, s2, how) {
  b = base("old", unit); if (b == "") return
  if (base("new", unit) == "" || managed("old", unit) && !managed("new", unit)) {
    parse_side("old", unit, before, s1)
    if (yes(before, "Unit|X-StopOnRemoval", 1)) put("stop", unit)
    return
  }
  if (unit ~ /\.target$/) {
    parse_side("new", unit, after, s2)
    # Every active target is started again, which starts what is new in it and what was stopped.
    if (unit !~ /^(suspend|hibernate|hybrid-sleep)\.target$/ && !yes(after, "Unit|RefuseManualStart", 0) \
        && !yes(after, "Unit|X-OnlyManualStart", 0)) { put("start", unit); if (!all) unsaid[unit] = 1 }
    if (yes(after, "Unit|X-StopOnReconfiguration", 0)) put("stop", unit)
    return
  }
  if (b == base("new", unit) && dropins["old", unit] dropins["new", unit] == "" \
      && (template_of(unit) == "" || dropins["old", template_of(unit)] dropins["new", template_of(unit)] == "")) return
  parse_side("old", unit, before, s1); parse_side("new", unit, after, s2)
  how = compare(before, after, s1, s2)
  if (how == "restart") modified(unit, after, 0)
  else if (how == "reload" && !has("restart", unit)) put("reload", unit)
}
# An instance that only drop-ins made part of the configuration.
function managed(side, unit) { return template_of(unit) != "" && !concrete(side, unit) && dropins[side, unit] != "" }

function key_of(k) { return substr(k, index(k, "|") + 1) }
function section_of(k) { return substr(k, 1, index(k, "|") - 1) }
function compare(before, after, s1, s2,   k, s, key, how, fresh) {
  how = "equal"; fresh = 0
  for (s in s1) gone[s] = !(s in s2)
  for (s in s2) if (!(s in s1)) fresh++
  if (fresh > 1) return "restart"
  for (s in s1) if (!(s in s2) && s != "Unit" && s != "Service") return "restart"
  for (s in s2) if (!(s in s1) && s != "Unit" && s != "Service") return "restart"
  for (k in before) {
    s = section_of(k); key = key_of(k)
    if (!(k in after)) {
      if (s == "Unit" && key in ignored || s == "Service" && key == "ExecReload") continue
      return "restart"
    }
    if (before[k] == after[k]) continue
    if (s == "Unit" && key == "X-Reload-Triggers" || s == "Service" && key == "ExecReload" || s == "Mount" && key == "Options")
      how = "reload"
    else if (!(s == "Unit" && key in ignored)) return "restart"
  }
  for (k in after) {
    if (k in before) continue
    s = section_of(k); key = key_of(k)
    if (s == "Unit" && key == "X-Reload-Triggers" || s == "Service" && key == "ExecReload") how = "reload"
    else if (!(s == "Unit" && key in ignored)) return "restart"
  }
  return how
}

# A unit that differs. `again`: an activation script asks for it, the old one is not stopped first.
function modified(unit, after, again,   stop, start, sockets, n, i, names, activated) {
  stop = again ? "restart" : "stop"; start = again ? "restart" : "start"
  if (unit ~ /^(sysinit|basic|multi-user|graphical)\.target$|\.(path|slice|socket)$/) return
  if (unit ~ /\.mount$/) { put(unit == "-.mount" || unit == "nix.mount" ? "reload" : "restart", unit); return }
  if (yes(after, "Service|X-ReloadIfChanged", 0) && !has("restart", unit) && !has(stop, unit)) { put("reload", unit); return }
  if (!yes(after, "Service|X-RestartIfChanged", 1) || yes(after, "Unit|RefuseManualStop", 0) \
      || yes(after, "Unit|X-OnlyManualStart", 0)) { put("skip", unit); return }
  if (!yes(after, "Service|X-StopIfChanged", 1) || unit !~ /\.service$/) put("restart", unit)
  else {
    sockets = after["Service|Sockets"]; gsub(/\n/, " ", sockets)
    if (sockets == "") { sockets = concrete("new", unit) ? unit : template_of(unit) == "" ? unit : template_of(unit)
      sub(/@?\.service$/, ".socket", sockets) }
    n = split(sockets, names, " ")
    for (i = 1; i <= n; i++) {
      if (names[i] in active && active[names[i]] != "inactive") {
        put(stop, names[i])
        if (base("new", names[i]) != "") { put(start, names[i]); activated = 1 }
      } else if (("new", names[i]) in there) activated = 1
    }
    if (yes(after, "Service|X-NotSocketActivated", 0)) activated = 0
    if (!activated) put(start, unit)
    put(stop, unit)
  }
  take("reload", unit)
}

function fstab(file, table,   line, f) {
  while ((getline line < file) > 0)
    if (line !~ /#/ && split(line, f, " ") >= 3 && f[3] != "swap") { table[f[2]] = f[1] " " f[3]; options[table[f[2]], file == "/etc/fstab", f[2]] = f[4] }
  close(file)
}
function mounts(   m, unit, same) {
  for (m in was) {
    unit = escaped(m) ".mount"
    if (!(m in will)) { put("stop", options[was[m], 1, m] ~ /x-systemd\.automount/ ? escaped(m) ".automount" : unit); continue }
    same = options[was[m], 1, m] == options[will[m], 0, m]
    if (was[m] == will[m] ? !same : (m == "/" || m == "/nix") && !same) put("reload", unit)
    else if (was[m] != will[m]) put(m == "/" || m == "/nix" ? "skip" : "restart", unit)
  }
}
function escaped(path,   i, c, out) {
  if (path == "/") return "-"
  sub(/^\//, "", path); sub(/\/$/, "", path)
  for (i = 1; i <= length(path); i++) {
    c = substr(path, i, 1)
    out = out (c == "/" ? "-" : c == "-" ? "\\x2d" : c == "." && i == 1 ? "\\x2e" : c)
  }
  return out
}

function say(list, shown,   k, p, n, names, i, j, x) {
  n = 0
  for (k in lists) { split(k, p, SUBSEP); if (p[1] == list && !(shown != "" && p[2] in unsaid)) names[++n] = p[2] }
  for (i = 2; i <= n; i++) {
    x = names[i]
    for (j = i - 1; j >= 1 && tolower(names[j]) > tolower(x); j--) names[j + 1] = names[j]
    names[j + 1] = x
  }
  printf "%s%s", list, shown
  for (i = 1; i <= n; i++) printf " %s", names[i]
  print ""
}
