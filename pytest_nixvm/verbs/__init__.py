"""What can be done to a VM, one room a subject; `Machine` is all of them together.

The verbs of the NixOS test driver keep its meaning and signatures
(https://nixos.org/manual/nixos/stable/#ssec-machine-objects), so that who knows them knows these.
What differs: standard error is kept and shown, waits follow the event instead of a clock of one
second, every wait is bounded and says what it saw.
"""
