#!/bin/busybox sh
# What busybox's DHCP client calls with an event and the lease in its environment.
case $1 in
  deconfig) ip link set "$interface" up ;;
  bound | renew)
    ip addr replace "$ip/$mask" dev "$interface"
    for gateway in $router; do ip route replace default via "$gateway" dev "$interface"; done
    for server in $dns; do echo "nameserver $server"; done > /etc/resolv.conf ;;
esac
