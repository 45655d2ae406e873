import os
from unittest.mock import Mock

import pytest

from mnist_ray.cluster.rendezvous import use_nodes_interface


@pytest.mark.parametrize(
    ("address", "set_by_user", "expected"),
    [
        ("127.0.0.1", {}, {"lo", "lo0"}),
        ("127.0.0.1", {"GLOO_SOCKET_IFNAME": "eth7", "NCCL_SOCKET_IFNAME": "eth7"}, {"eth7"}),
        ("203.0.113.7", {}, {None}),
    ],
)
def test_gloo_and_nccl_use_the_interface_of_the_nodes_address_unless_the_user_has_set_one(
    address: str, set_by_user: dict[str, str], expected: set[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", set_by_user)
    monkeypatch.setattr("ray.util.get_node_ip_address", Mock(return_value=address))
    use_nodes_interface()
    assert set_by_user.get("GLOO_SOCKET_IFNAME") in expected
    assert set_by_user.get("NCCL_SOCKET_IFNAME") in expected
