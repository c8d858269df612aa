"""The service: its answers are those of `open_store`; limits, the token, new releases; nothing leaks."""

import io
import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from starlette.testclient import TestClient

import frontalis
from frontalis.service.app import ServiceSettings, create_app
from frontalis.service.limits import Limits
from schemas.errors import SettingsError
from schemas.releases import Release
from storage.features import features_table
from storage.location import Location
from storage.releases import Releases

TOKEN = "a-secret-of-the-tests"
LIMITS = Limits(body=100_000, queries=50, k=20, neighbours=1_000, seconds=20)


def client(store: str, **settings: object) -> TestClient:
    made = create_app(ServiceSettings(store, **{"limits": LIMITS, "refresh": 3600.0, **settings}))
    return TestClient(made, base_url="http://127.0.0.1:8000")


@pytest.fixture(scope="module")
def store(measured_store, tmp_path_factory) -> str:
    return str(shutil.copytree(measured_store, tmp_path_factory.mktemp("served") / "store"))


@pytest.fixture(scope="module")
def service(store, tmp_path_factory):
    with client(store, audit=str(tmp_path_factory.mktemp("audit") / "log")) as made:
        yield made


@pytest.fixture(scope="module")
def raw_rows(store) -> pl.DataFrame:
    table = features_table(Location(store))
    record = Releases(Location(store)).serving()
    return pl.scan_delta(table.place.uri, version=record.features_version).filter(pl.col("mode") == "raw").collect()


def npy(matrix: np.ndarray) -> bytes:
    target = io.BytesIO()
    np.save(target, matrix)
    return target.getvalue()


def test_answers_are_those_of_the_store_by_id_json_and_npy(service, store, raw_rows) -> None:
    ids, vectors = raw_rows["id"][:4].to_list(), np.stack(raw_rows["front"][:4].to_list()).astype(np.float32)
    with frontalis.open_store(store) as opened:
        expected = opened.neighbours("per_sample", ids, 5)
        near = opened.index("batch_stat").search(
            opened.reweight("batch_stat", vectors), 5, where="yaw > 0", columns=["yaw"], expand=3
        )
        threshold = opened.threshold("per_sample", 1e-2)
    found = service.post("/search", json={"ids": ids, "k": 5, "mode": "all", "fmr": "1e-2"}).json()
    assert (found["release"], list(found["answers"])) == ("r1", ["raw", "per_sample", "batch_stat"])
    answer = found["answers"]["per_sample"]
    assert answer["threshold"] == threshold
    for query, result in enumerate(answer["results"]):
        assert (result["query"], [one["id"] for one in result["neighbours"]]) == (
            ids[query],
            expected.ids[query].tolist(),
        )
        assert [one["match"] for one in result["neighbours"]] == (expected.scores[query] >= threshold).tolist()
    options = {"k": 5, "mode": "batch_stat", "where": "yaw > 0", "columns": ["yaw"], "expand": 3}
    by_json = service.post("/search", json={"vectors": vectors.tolist(), **options}).json()
    by_npy = service.post(
        "/search/npy", params=options, content=npy(vectors), headers={"content-type": "application/octet-stream"}
    ).json()
    assert by_json == by_npy
    for query, result in enumerate(by_json["answers"]["batch_stat"]["results"]):
        assert [one["id"] for one in result["neighbours"]] == near.ids[query].tolist()
        assert all(one["columns"]["yaw"] > 0 for one in result["neighbours"])
    one = service.get(f"/neighbours/{ids[0]}", params={"k": 5}).json()
    assert [row["id"] for row in one["answers"]["per_sample"]["results"][0]["neighbours"]] == expected.ids[0].tolist()
    answers = [json.dumps(one), json.dumps(by_json), json.dumps(found)]
    assert not any("front" in one or "embedding" in one or store in one for one in answers)


def test_concurrent_requests_share_searches_and_keep_their_answers(service, raw_rows) -> None:
    ids = raw_rows["id"].to_list()[:40]
    alone = [service.get(f"/neighbours/{one}", params={"k": 3, "mode": "raw"}).json() for one in ids]
    with ThreadPoolExecutor(16) as pool:
        asked = [{"ids": [one], "k": 3, "mode": "raw"} for one in [*ids, "nobody"]]
        together = list(pool.map(lambda body: service.post("/search", json=body), asked))
    assert together[-1].status_code == 404  # fails alone, whatever it shared a search with
    for one, other in zip(alone, together, strict=False):
        (first,), (second,) = one["answers"]["raw"]["results"], other.json()["answers"]["raw"]["results"]
        assert [row["id"] for row in first["neighbours"]] == [row["id"] for row in second["neighbours"]]
        np.testing.assert_allclose(
            [row["score"] for row in first["neighbours"]], [row["score"] for row in second["neighbours"]], atol=1e-6
        )
    figures = service.get("/metrics").text
    assert 'frontalis_release_number{release="r1"} 1.0' in figures
    assert 'frontalis_request_seconds_count{endpoint="/search",status="404"} 1.0' in figures


def test_what_cannot_be_answered_is_refused_in_one_line(service) -> None:
    cases = [
        ({}, 400, "pass either ids or vectors"),
        ({"ids": ["x"], "vectors": [[1.0]]}, 400, "pass either ids or vectors"),
        ({"ids": ["nobody"]}, 404, "is not in release r1 of the store"),
        ({"ids": ["x"], "k": 21}, 400, "k 21: must be 1 to 20"),
        ({"ids": ["x"] * 51}, 400, "51 queries: pass 1 to 50"),
        ({"ids": ["x"] * 50, "k": 20, "mode": "all"}, 400, "in 3 modes: 1,000 neighbours a request at most"),
        ({"ids": ["x"], "kk": 1}, 400, "kk: Extra inputs"),
        ({"ids": ["x"], "mode": "none"}, 400, "mode none: release r1 has"),
        ({"ids": ["x"], "fmr": 2}, 400, "fmr: 2.0 is no rate"),
        ({"ids": ["x"], "columns": ["front"]}, 400, "column 'front': is not stored"),
        (
            {"vectors": [[1.0] * 32], "where": "1 = (select 1)"},
            400,
            "where '1 = (select 1)': 'select' is no stored column",
        ),
        ({"vectors": [[1.0, 2.0]]}, 400, "vectors: has 2 numbers a row, the index 32"),
        ({"vectors": [[1.0] * 32, [1.0]]}, 400, "vectors: are not of one length"),
        ({"vectors": [[0.0] * 32]}, 400, "vectors: row 0 is zero or not finite"),
        ({"vectors": [[1e300] * 32]}, 400, "vectors: row 0 is zero or not finite"),
        ({"vectors": [[0.123456789] * 32] * 400}, 413, "the body is larger than 100,000 bytes"),
    ]
    for body, status, says in cases:
        answer = service.post("/search", json=body)
        assert (answer.status_code, says in answer.json()["error"]) == (status, True), (body, answer.text)
        assert "\n" not in answer.json()["error"]
    for content, kind, status in (
        (b"{", "application/json", 400),
        (b"{}", "text/plain", 415),
        (iter([b" " * 60_000] * 2), "application/json", 413),  # without a length
    ):
        assert service.post("/search", content=content, headers={"content-type": kind}).status_code == status
    octets = {"content-type": "application/octet-stream"}
    for content in (b"", npy(np.ones(32, np.int64)), npy(np.ones(32))[:-1], npy(np.array([{}], object))):
        assert service.post("/search/npy", content=content, headers=octets).status_code == 400
    assert service.get("/nowhere").json() == {"error": "Not Found"}


def test_too_many_or_too_slow_requests_are_refused(measured_store, monkeypatch) -> None:
    held = threading.Event()

    def slow(jobs) -> None:
        held.wait(20)
        raise SettingsError("nobody waits for this any more")

    monkeypatch.setattr("frontalis.service.batching.search", slow)
    limits = Limits(waiting=0)
    with client(measured_store, limits=limits) as service:
        answer = service.post("/search", json={"ids": ["x"]})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    with client(measured_store, limits=Limits(seconds=0.2)) as service:
        answer = service.post("/search", json={"ids": ["x"]})
        assert (answer.status_code, answer.json()["error"]) == (504, "took longer than 0.2 s.")
        held.set()


def test_the_token_is_wanted_and_other_names_are_not_answered(measured_store, service) -> None:
    refused = service.get("/release", headers={"host": "evil.example"})
    assert (refused.status_code, "another host" in refused.json()["error"]) == (421, True)
    with client(measured_store, token=TOKEN) as guarded:
        for path in ("/", "/static/app.js", "/healthz", "/readyz"):
            assert guarded.get(path).status_code == 200, path
        paths = ("/release", "/releases", "/metrics", "/openapi.json", "/reports/r1/index.html", "/neighbours/x")
        for path in paths:
            for headers in ({}, {"authorization": "Bearer wrong"}, {"cookie": f"frontalis={TOKEN}"}):
                assert guarded.get(path, headers=headers).status_code == 401, path
        assert guarded.get("/release", headers={"authorization": f"Bearer {TOKEN}", "host": "a.b"}).status_code == 200
        assert guarded.post("/session", json={"token": "wrong"}).status_code == 401
        answer = guarded.post("/session", json={"token": TOKEN})
        assert {"HttpOnly", "SameSite=strict"} <= set(answer.headers["set-cookie"].split("; "))
        assert TOKEN not in answer.headers["set-cookie"]
        assert guarded.get("/release").status_code == 200  # by the cookie


def test_reports_are_served_and_nothing_beside_them(store, service) -> None:
    folder = Path(store) / "reports/r1"
    (folder / "index.html").write_text("<p>the report</p>")
    history = Releases(Location(store))
    releases = history.all()
    history.rewrite([releases[0].replaced(report="reports/r1/index.html")], releases)
    answer = service.get("/reports/r1/index.html")
    assert answer.text == "<p>the report</p>"
    assert "script-src" not in answer.headers["content-security-policy"]
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    (folder / "secret").write_text("x")
    for path in ("r1/secret", "r1/..%2f..%2ftombstones.json", "r1/plots/..%2f..%2fsecret", "r2/index.html", "r1/"):
        assert service.get(f"/reports/{path}").status_code == 404, path
    assert service.get("/releases").json()["releases"][0]["report"] == "/reports/r1/index.html"
    summary = service.get("/release").json()
    assert [group["title"] for group in summary["table"]["groups"]][:1] == ["frontal–profile"]
    assert summary["modes"][1]["thresholds"]["1e-2"] > 0


def test_every_query_is_in_the_audit_log(service, store, raw_rows, tmp_path) -> None:
    file = tmp_path / "audit"
    with client(store, audit=str(file)) as audited:
        audited.get(f"/neighbours/{raw_rows['id'][0]}", params={"mode": "raw"})
        audited.post("/search", json={"ids": ["nobody"], "where": "id = 'other'"})
        audited.post("/search", json={"vectors": [[1.0] * 32]})
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line["ids"], line["vectors"], line["where"], line["release"]) for line in lines] == [
        ([raw_rows["id"][0]], 0, None, "r1"),
        (["nobody"], 0, "id = 'other'", "r1"),
        ([], 1, None, "r1"),
    ]
    assert file.stat().st_mode & 0o077 == 0


def test_the_openapi_document_names_all_endpoints_with_examples(service) -> None:
    document = service.get("/openapi.json").json()
    assert {"/search", "/search/npy", "/neighbours/{stored_id}", "/releases", "/healthz", "/metrics"} <= set(
        document["paths"]
    )
    schema = document["paths"]["/search"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert schema["examples"][0]["ids"]


def test_a_release_takes_over_and_one_with_a_forgotten_person_is_never_answered_from(
    measured_store, pipeline_of, serve_stages, tiny_source, tmp_path
) -> None:
    uri = str(shutil.copytree(measured_store, tmp_path / "store"))
    with client(uri, refresh=0.05) as service, ThreadPoolExecutor(1) as pool:
        body = {"vectors": [[1.0] * 32], "k": 2, "mode": "all"}
        making = pool.submit(serve_stages, pipeline_of(tiny_source, uri))
        seen = []
        while seen[-1:] != ["r2"]:
            answer = service.post("/search", json=body)
            assert answer.status_code == 200, answer.text
            found = answer.json()
            assert {one["release"] for one in found["answers"].values()} == {found["release"]}
            seen.append(found["release"])
        assert isinstance(making.result(), Release)
        assert seen == sorted(seen)
        history = Releases(Location(uri))
        releases = history.all()
        history.rewrite([releases[0].as_erased(), releases[1].as_erased()], releases)
        for _ in range(200):
            ready = service.get("/readyz")
            if ready.status_code == 503:
                break
        assert "holds a person who was forgotten since" in ready.json()["error"]
        assert service.post("/search", json=body).status_code == 503
        assert service.get("/healthz").status_code == 200
