"""What every environment has to do, as checks that run against a real one.

`rlm conformance ENV` runs them from a shell, and the pytest plugin from a third party's test suite:

    @pytest.mark.rlm_environment("podman", memory="1GiB")
    def test_conformance(rlm_check):
        rlm_check()
"""
