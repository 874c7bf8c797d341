#!/bin/busybox sh
# dhcpcd.service: busybox's client on every network card whose name is in WANTED (all of them if that is empty), but for
# those in NEVER. Ends when each has an address, or has waited for one long enough; the clients stay.
for card in /sys/class/net/*/device; do
  read -r index < "${card%device}ifindex"
  # udev may still rename it: its database has the card when that is done.
  for _ in $(seq 200); do [ -e "/run/udev/data/n$index" ] && break; usleep 50000; done
done
for card in /sys/class/net/*/device; do
  name=${card%/device}; name=${name##*/}
  case " $NEVER " in *" $name "*) continue ;; esac
  case " ${WANTED:-$name} " in *" $name "*) ;; *) continue ;; esac
  udhcpc -i "$name" -b -S -T 1 -t 10 -s "$1" &
done
wait
