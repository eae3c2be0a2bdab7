"""A set of absl flags for each command, so that several commands can be imported into one process."""

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from absl import flags

from llada.errors import UserError

# What a flag holds when it is not given: None, or a value of its own kind.
Text = TypeVar("Text", None, str)
Integer = TypeVar("Integer", None, int)
Number = TypeVar("Number", None, float)
Texts = TypeVar("Texts", None, list[str])


def required(flag: flags.FlagHolder[str | None], advice: str) -> str:
    """The value of a flag that must be given. UserError, with the advice, if it is not."""
    if not flag.value:
        raise UserError(f"--{flag.name} is missing; {advice}")
    return flag.value


class CommandFlags(flags.FlagValues):
    """absl flags with `shared` ones of other modules among them; a flag has its default until it is parsed."""

    def __init__(self, *shared: "CommandFlags"):
        super().__init__()
        for others in shared:
            self.append_flag_values(others)
        self.mark_as_parsed()

    def define_string(self, name: str, default: Text, meaning: str) -> flags.FlagHolder[str | Text]:
        """A text."""
        return flags.DEFINE_string(name, default, meaning, self)

    def define_multi_string(self, name: str, default: Texts, meaning: str) -> flags.FlagHolder[list[str] | Texts]:
        """Texts: one for each time that the flag is given."""
        return flags.DEFINE_multi_string(name, default, meaning, self)

    def define_bool(self, name: str, default: bool, meaning: str) -> flags.FlagHolder[bool]:
        """A switch: --name or --noname."""
        return flags.DEFINE_bool(name, default, meaning, self)

    def define_integer(
        self,
        name: str,
        default: Integer,
        meaning: str,
        lower_bound: int | None = None,
        upper_bound: int | None = None,
    ) -> flags.FlagHolder[int | Integer]:
        """A whole number within its bounds."""
        return flags.DEFINE_integer(name, default, meaning, lower_bound, upper_bound, self)

    def define_optional_integer(
        self, name: str, alone: int, meaning: str, lower_bound: int | None = None, upper_bound: int | None = None
    ) -> flags.FlagHolder[int | None]:
        """A switch that may have a whole number: None without it, `alone` for --name by itself."""
        flag = flags.Flag(_Optional(alone, lower_bound, upper_bound), None, name, None, meaning, boolean=True)
        return flags.DEFINE_flag(flag, self)

    def define_float(self, name: str, default: Number, meaning: str) -> flags.FlagHolder[float | Number]:
        """A number."""
        return flags.DEFINE_float(name, default, meaning, flag_values=self)

    def define_enum(
        self, name: str, default: Text, choices: Sequence[str], meaning: str
    ) -> flags.FlagHolder[str | Text]:
        """One of `choices`."""
        return flags.DEFINE_enum(name, default, choices, meaning, self)

    def parse(self, command: str, words: list[str], unknown: Callable[[str], str]) -> None:
        """Set the flags from the words after the command's name; flags that are not among them get their defaults.

        UserError for a word that is no flag, an unknown flag (with the message `unknown(flag)`), and a flag without its
        value, where absl would take the following flag as the value. If a flag is given twice the last value counts,
        as scripts rely on, and a line says so.
        """
        first: dict[str, str] = {}
        rest = iter(words)
        for word in rest:
            if not word.startswith("-") or word.strip("-") == "":
                raise UserError(f"{word!r} is not a flag; flags look like --name=value; see llada {command} --help")
            name, equals, _ = word.lstrip("-").partition("=")
            positive = name.removeprefix("no")
            if name not in self and positive in self and self[positive].boolean:
                name = positive
            if name not in self:
                raise UserError(unknown(name))
            if not equals and not self[name].boolean and next(rest, "--").startswith("--"):
                raise UserError(f"--{name} needs a value: --{name}=...")
            if name in first and not isinstance(self[name], flags.MultiFlag):
                print(f"llada: {first[name]} is given again; {word} counts", file=sys.stderr)
            first[name] = word
        self.unparse_flags()  # values of an earlier call in this process
        try:
            self([f"llada {command}", *words])
        except flags.Error as error:
            raise UserError(str(error)) from error

    def help_text(self) -> str:
        """Every flag with its meaning, default and kind, in alphabetical order."""
        one_list = flags.FlagValues()  # of no module: absl prints it without headings
        one_list.append_flag_values(self)
        return one_list.get_help("  ", include_special_flags=False)


class _Optional(flags.IntegerParser):
    """Parser of a switch with a number: absl writes `true` for --name and `false` for --noname."""

    def __init__(self, alone: int, lower_bound: int | None, upper_bound: int | None):
        super().__init__(lower_bound, upper_bound)
        self._alone = alone

    def parse(self, argument):
        return (
            {"true": self._alone, "false": None}[argument] if argument in ("true", "false") else super().parse(argument)
        )
