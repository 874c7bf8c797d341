# The configuration's accounts and those that are there → /etc/{passwd,group,shadow}.new, and the homes with their owners.
# An account that is there keeps its number, unless the configuration gives one; who was declared before and is no more goes;
# with mutable users, who was made by hand stays, and so does a password that was changed by hand.
# Variables: accounts, before (directories of build-users.py), mutable, homes (file).
BEGIN {
  while ((getline < (accounts "/automatic")) > 0) automatic[$1, $2] = 1
  while ((getline < (accounts "/fixed")) > 0) fixed[$1] = 1
  merge("group"); merge("passwd")
  shadow()
  FS = OFS = " "
  while ((getline < (accounts "/homes")) > 0) print $1, number["passwd", $2], number["group", $3], $4 > homes
}

# One of both files: the numbers first, then the lines.
function merge(file,   path, n, i, lines, names, taken, line, out, id, last) {
  path = "/etc/" file; out = path ".new"; last = 0
  while ((getline < path) > 0) { there[file, $1] = $3; old_line[file, ++last] = $0; taken[$3] = $1 }
  close(path)
  path = before "/" file
  while ((getline < path) > 0) declared[file, $1] = 1
  close(path)
  path = accounts "/" file; n = 0
  while ((getline < path) > 0) {
    n++; lines[n] = $0; names[n] = $1; now[file, $1] = 1
    if (!((file, $1) in automatic)) { taken[$3] = $1; given[file, $3] = $1 }
  }
  close(path)
  for (i = 1; i <= n; i++) {
    $0 = lines[i]; id = $3
    if ((file, $1) in automatic) {
      if ((file, $1) in there && !((file, there[file, $1]) in given)) id = there[file, $1]
      else while (id in taken && taken[id] != $1) id += id < 1000 ? -1 : 1
      taken[id] = $1
    }
    number[file, $3] = id; $3 = id
    if (file == "passwd") $4 = number["group", $4]
    print > out
  }
  for (i = 1; i <= last; i++) {
    $0 = old_line[file, i]
    if ((file, $1) in now) continue
    if (mutable && !((file, $1) in declared)) print > out
    else { gone[file, $1] = 1; print "removing " (file == "group" ? "group" : "user") " ‘" $1 "’" > "/dev/stderr" }
  }
  close(out)
}

function shadow(   name, kept) {
  while ((getline < "/etc/shadow") > 0) if (!(("passwd", $1) in gone)) kept[$1] = $0
  while ((getline < (accounts "/shadow")) > 0) {
    if (mutable && $1 in kept && !($1 in fixed)) print kept[$1] > "/etc/shadow.new"
    else print > "/etc/shadow.new"
    delete kept[$1]
  }
  for (name in kept) print kept[name] > "/etc/shadow.new"
}
