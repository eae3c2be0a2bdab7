"""docs/guarantees.md names tests that exist, each in the table that writes it."""

import re

import guarantees


def test_every_promise_has_tests_that_exist():
    assert guarantees.tests() and not [test for test in guarantees.tests() if not guarantees.exists(test)]
    promises = [promise for kind in guarantees.GUARANTEES.values() for promise, held_by in kind if held_by]
    page = guarantees.PAGE.read_text(encoding="utf-8")
    assert all(f"| {promise} |" in page for promise in promises)
    assert set(re.findall(r"`([\w/]+\.py(?:::\w+)?)` \(\d", page)) == guarantees.tests()
