"""Flags of one command in a set of their own, so that several commands can be imported into one process."""

from collections.abc import Sequence
from typing import TypeVar

from absl import flags

# What a flag holds when it is not given: None, or a value of its own kind.
Text = TypeVar("Text", None, str)
Integer = TypeVar("Integer", None, int)
Number = TypeVar("Number", None, float)


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

    def define_multi_string(self, name: str, default: list[str] | None, meaning: str) -> flags.FlagHolder[list[str]]:
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

    def define_float(self, name: str, default: Number, meaning: str) -> flags.FlagHolder[float | Number]:
        """A number."""
        return flags.DEFINE_float(name, default, meaning, flag_values=self)

    def define_enum(
        self, name: str, default: Text, choices: Sequence[str], meaning: str
    ) -> flags.FlagHolder[str | Text]:
        """One of `choices`."""
        return flags.DEFINE_enum(name, default, choices, meaning, self)

    def help_text(self) -> str:
        """Every flag with its meaning, default and kind, in alphabetical order."""
        one_list = flags.FlagValues()  # of no module: absl prints it without headings
        one_list.append_flag_values(self)
        return one_list.get_help("  ", include_special_flags=False)
