"""The networks, samplers and mergers against numbers recorded from the published implementations, in float32."""

from tests.reference.cases_lib.case import Case
from tests.reference.cases_lib.measure import measure


def test_case(case_path, record_rows, request):
    name = request.node.callspec.id
    case = Case.load(case_path)
    try:
        measurements = measure(case)
    except Exception as error:
        record_rows([(name, f"FAILED: {type(error).__name__}", None, None)])
        raise
    record_rows([(name, m.output, m.error, m.tolerance) for m in measurements])
    wrong = [f"{m.output}: {m.error:.1e} > {m.tolerance:.0e}" for m in measurements if not m.passed]
    assert not wrong, f"{name} ({case.kind}) differs from the record: {'; '.join(wrong)}"
