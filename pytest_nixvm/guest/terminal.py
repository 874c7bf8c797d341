"""What a terminal shows when it waits for somebody, and what is typed at a shell."""

from __future__ import annotations

import re
import shlex

LOGIN = re.compile(r"\b[Ll]ogin: ?\Z")
PASSWORD = re.compile(r"\b[Pp]assword(?: for \S+)?: ?\Z")
REFUSED = re.compile(
    r"Login incorrect|Authentication failure|[Aa]ccess denied|Permission denied$"
    r"|[Aa]ccount (?:has )?expired|account is currently not available|System is going down",
    re.MULTILINE,
)
PROMPT = re.compile(r"(?:[#$%❯»λ]|(?<!>)>) ?\Z")
"""The end of most shells' prompts: `[root@host:~]# `, `$ `, `host% `, `❯ `."""

QUESTION = re.compile(r"(?i)pass(?:phrase|word|code)|[:?] *\Z")
"""A line that asks for something else: an empty answer might do harm (a disk's passphrase)."""

KERNEL_LINE = re.compile(r"\[ *\d{1,6}\.\d{6}\](?:\[ *[TC]\d+\])? [^\n]*\n")
"""A message of the kernel, which goes to the console in the middle of whatever is being printed."""

LONGEST_LINE = 1000
"""Characters typed in one go: a terminal that nobody reads from drops what exceeds 4095."""


def whose_shell(token: str) -> str:
    """Return a line for a shell of any kind; it prints `nixvm-TOKEN-shell-FISH_VERSION-`.

    In this and what follows the mark is put together by printf, so that the echo is not the mark.
    """
    return f"printf 'nixvm-%s-shell-%s-\\n' {token} \"$FISH_VERSION\""


def settle_in(token: str) -> str:
    """Return a line that makes a POSIX shell plain; it prints `nixvm-TOKEN-user-NAME-`.

    No echo and no line editor that redraws, no history, no wrapping, a prompt without colours. The
    leading space keeps the line itself out of the history.
    """
    return (
        " stty -echo cols 1000 2>/dev/null; unset PROMPT_COMMAND HISTFILE; PS2=; PS1='nixvm$ '; "
        '[ -z "$BASH_VERSION" ] || bind "set enable-bracketed-paste off" 2>/dev/null; '
        '[ -z "$ZSH_VERSION" ] || unsetopt zle prompt_cr prompt_sp; '
        f"printf 'nixvm-%s-user-%s-\\n' {token} \"$(id -un)\""
    )


def command_lines(command: str, token: str) -> list[str]:
    """Return the lines to type, one prompt each, to run `command` between two marks.

    They print `nixvm-TOKEN-begin`, the command's output and `nixvm-TOKEN-end-STATUS`. The command
    goes through `eval`, so that a syntax error in it stays its own; what a terminal would act on
    (newlines, tabs, other control characters, history's `!`) is written as an octal number.
    """
    begin, end = (f"printf '\\nnixvm-%s-{which}\\n' {token}" for which in ("begin", "end-%d"))
    if re.fullmatch(r"[ -~]*", command) and "!" not in command:
        line = f"{begin}; eval {shlex.quote(command)}; {end} $?"
        if len(line) <= LONGEST_LINE:
            return [line]
    octal = [
        chr(byte) if chr(byte).isascii() and chr(byte).isalnum() else f"\\0{byte:03o}"
        for byte in command.encode()
    ]
    lines, part = ["nixvm="], ""
    for each in octal:
        part += each
        if len(part) >= LONGEST_LINE - 50:
            lines.append(f"nixvm=$nixvm'{part}'")
            part = ""
    lines.append(f"nixvm=$nixvm'{part}'")
    return [*lines, f'{begin}; eval "$(printf %b "$nixvm")"; {end} $?']
