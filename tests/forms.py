"""What events in the forms of other systems must be, by those systems' own schemas."""

from __future__ import annotations

import base64
from typing import Any

import pytest


def check_ocsf(events: list[Any]) -> None:
    """API Activity of OCSF, every event with an id of its own."""
    jsonschema, ocsf = pytest.importorskip("jsonschema"), pytest.importorskip("ocsf_json_schema")
    schemas = ocsf.OcsfJsonSchemaEmbedded(ocsf.get_ocsf_schema(version="1.8.0"))
    name = schemas.lookup_class_name_from_uid(class_uid=6003)
    check = jsonschema.Draft202012Validator(schemas.get_class_schema(class_name=name, profiles=[]))
    assert len(events) == len({event["metadata"]["uid"] for event in events})
    assert [fault.message for event in events[:500] for fault in check.iter_errors(event)] == []
    assert {event["status_id"] for event in events} == {1, 2}


# Of ECS 9 (fields/ecs/ecs_flat.yml): those that we fill, with the kind of value that each takes.
ECS = dict.fromkeys(
    ("@timestamp", "client.address", "client.ip", "ecs.version", "error.message", "error.type")
    + ("event.action", "event.dataset", "event.id", "event.kind", "event.module", "event.outcome")
    + ("event.provider", "event.reason", "http.request.id", "message", "service.name", "trace.id")
    + ("user.id", "user_agent.original"),
    str,
) | {"event.category": list, "event.type": list, "event.duration": int}


def flat(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the fields of an event by their full names."""
    fields: dict[str, Any] = {}
    for name, value in node.items():
        fields.update(flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return fields


def check_ecs(events: list[Any]) -> None:
    """Fields of ECS with their kind of value, and one namespace of ours."""
    for event in map(flat, events):
        for name, value in event.items():
            assert name.startswith("mxcp_audit.") or isinstance(value, ECS[name])
        assert event["event.outcome"] in ("success", "failure")
        assert event["event.category"] == ["api"] and event["event.type"][0] in ("access", "denied")


def check_otlp(events: list[Any]) -> None:
    """Requests that OpenTelemetry's own protocol buffers parse."""
    service = pytest.importorskip("opentelemetry.proto.collector.logs.v1.logs_service_pb2")
    json_format = pytest.importorskip("google.protobuf.json_format")
    uids = set()
    for event in events:
        (resource,) = event["resourceLogs"]
        (record,) = resource["scopeLogs"][0]["logRecords"]
        if "traceId" in record:  # OTLP has it as hex, where protobuf's own JSON has base64
            record["traceId"] = base64.b64encode(bytes.fromhex(record["traceId"])).decode()
        parsed = json_format.ParseDict(event, service.ExportLogsServiceRequest())
        attributes = parsed.resource_logs[0].scope_logs[0].log_records[0].attributes
        uids |= {each.value.string_value for each in attributes if each.key == "log.record.uid"}
    assert len(events) == len(uids)


CHECKS = {"ocsf": check_ocsf, "ecs": check_ecs, "otlp": check_otlp}
