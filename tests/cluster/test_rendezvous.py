from mnist_ray.cluster.rendezvous import interface_of


def test_the_interface_of_an_address_is_found() -> None:
    assert interface_of("127.0.0.1") in ("lo", "lo0")


def test_an_address_that_no_interface_has_gives_none() -> None:
    assert interface_of("203.0.113.7") is None
