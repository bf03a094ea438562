from attention_cases import Case, check_case
import pytest, torch
pytestmark = pytest.mark.usefixtures("checked")
@pytest.mark.parametrize("d", (64,128))
def test_x(d, recording):
    case = Case(256, 40, d, batch=2, num_heads=8, num_kv_heads=2, dtype=torch.float16)
    with recording() as launches:
        check_case(case)
    for x in launches: print(x.kernel, x)
    assert 0
