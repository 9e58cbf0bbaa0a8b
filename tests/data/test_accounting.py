import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxchunk.data.accounting import EXCLUSIONS, KEPT, Accounting
from jaxchunk.data.accounting import count_documents as count

_DOCUMENTS = st.lists(
  st.tuples(st.integers(2, 1000), st.integers(KEPT, len(EXCLUSIONS) - 1)),
  max_size=20,
)


def _count(documents) -> Accounting:
  pairs = np.asarray(documents, np.int64).reshape(-1, 2)
  return count(pairs[:, 0], pairs[:, 1])


@pytest.mark.fast
@given(_DOCUMENTS, _DOCUMENTS)
def test_parts_sum_to_what_was_read_and_add_up(first, second):
  total = (_count(first) + _count(second)).check()
  assert total == _count(first + second)
  assert total.read == sum(length for length, _ in first + second)
  assert total.truncated == 0
  assert Accounting.from_json(json.loads(json.dumps(total.to_json()))) == total


def test_first_token_is_masked():
  counted = count(np.asarray([5, 3]), np.asarray([KEPT, KEPT]))
  assert (counted.trained, counted.masked, counted.read) == (6, 2, 8)


def test_check_refuses_a_token_that_went_missing():
  with pytest.raises(ValueError, match="does not add up: 10 tokens read = 8"):
    Accounting(read=10, trained=8, masked=1).check()


def test_unknown_entry_of_a_cursor_is_refused():
  with pytest.raises(ValueError, match="unknown entries"):
    Accounting.from_json({"red": 3})


def test_prints_as_a_line_and_as_a_table():
  counted = count(
    np.asarray([1001, 7, 9]),
    np.asarray([KEPT, *map(EXCLUSIONS.index, ("held_out", "too_long"))]),
  )
  assert str(counted) == (
    "1,017 tokens read = 1,000 trained + 1 masked + 0 truncated + 16 excluded"
    " (held_out 7, too_long 9)"
  )
  lines = counted.table().splitlines()
  assert lines[-1].split() == ["read", "1,017", "100.0%", "3"]
  assert "excluded: too_long" in lines[-2]
  assert max(map(len, lines)) <= 80
  assert "read" in Accounting().table()
