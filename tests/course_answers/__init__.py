"""Answers to the course's assignments, right ones and wrong ones, with what each has to lose.

A module per assignment. ``CORRECT`` are ways of writing the assignment: its name -> solution cell -> code; what a way
does not write it leaves to the reference solution. ``IDLE`` is every solution cell with an answer that does nothing:
it returns what it was given, or nothing. ``WRONG`` are answers with one mistake each.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Wrong:
    """An answer with a mistake.

    Attributes:
        mistake: In a few words.
        cell: The solution cell in which it is made; ``code``: what is written there. All others are right.
        loses: Grade cell -> the points it has to cost there, and a part of the message that has to be given. No other
            cell may take points.
    """

    mistake: str
    cell: str
    code: str
    loses: dict[str, tuple[int, str]]
