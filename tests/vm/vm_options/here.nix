{
  key = "ssh-ed25519 AAAA";
  work = "/nonexistent/work";
  music = "/nonexistent/music";
  port = 2222;
}
