# Accepted: nothing of it matters to the stand-in's guest.
{ ... }: { }
