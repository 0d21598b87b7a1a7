import jax
import jax.numpy as jnp
import numpy as np
from scipy.cluster.vq import vq as scipy_vq
from scipy.spatial.transform import Rotation

from decomp_jax.models import vq
from decomp_jax.types import CodebookStats

RNG = np.random.default_rng(0)
CODEBOOK = jnp.asarray(RNG.normal(size=(16, 5)), jnp.float32)
Z_E = jnp.asarray(RNG.normal(size=(2, 3, 3, 5)), jnp.float32)


def test_nearest_code_equals_scipy():
    expected, _ = scipy_vq(np.asarray(Z_E).reshape(-1, 5), np.asarray(CODEBOOK))
    np.testing.assert_array_equal(vq.nearest_code(Z_E, CODEBOOK).reshape(-1), expected)


def test_straight_through_is_the_code_forward_and_the_identity_backward():
    z_q = vq.lookup(vq.nearest_code(Z_E, CODEBOOK), CODEBOOK)
    np.testing.assert_allclose(vq.straight_through(Z_E, z_q), z_q, atol=1e-6)
    on_encoder, on_codes = jax.grad(lambda a, b: (3 * vq.straight_through(a, b)).sum(), argnums=(0, 1))(Z_E, z_q)
    assert (on_encoder == 3).all() and (on_codes == 0).all()


def test_rotation_trick_is_the_code_forward_and_scipys_rotation_backward():
    z_e, z_q = Z_E[0, 0, 0, :3], CODEBOOK[3, :3]
    np.testing.assert_allclose(vq.rotate_through(z_e, z_q), z_q, rtol=1e-5)
    e, q = (np.asarray(z / jnp.linalg.norm(z), float) for z in (z_e, z_q))
    axis = np.cross(e, q)
    turn = Rotation.from_rotvec(axis / np.linalg.norm(axis) * np.arccos(e @ q)).as_matrix()
    scale = float(jnp.linalg.norm(z_q) / jnp.linalg.norm(z_e))
    np.testing.assert_allclose(jax.jacobian(vq.rotate_through)(z_e, z_q), scale * turn, atol=1e-5)
    assert not jax.jacobian(vq.rotate_through, argnums=1)(z_e, z_q).any()


def test_rotation_trick_is_straight_where_a_vector_is_zero():
    for z_e, z_q in ((Z_E[0, 0, 0], jnp.zeros(5)), (jnp.zeros(5), CODEBOOK[0])):
        np.testing.assert_allclose(vq.rotate_through(z_e, z_q), z_q, atol=1e-6)
        np.testing.assert_array_equal(jax.jacobian(vq.rotate_through)(z_e, z_q), np.eye(5))


def test_finding_follows_the_norm():
    norms = np.square(np.asarray(Z_E)).sum(-1)
    np.testing.assert_array_equal(vq.is_finding(Z_E, 4.0), norms > 4.0)


def test_usage_of_uniform_and_single_codes():
    used, perplexity = vq.usage(jnp.arange(8), 16)
    np.testing.assert_allclose((used, perplexity), (0.5, 8.0), rtol=1e-5)
    np.testing.assert_allclose(vq.usage(jnp.zeros(9, jnp.int32), 16), (1 / 16, 1.0), rtol=1e-5)


def test_average_moves_codes_to_the_mean_of_their_vectors():
    flat = Z_E.reshape(-1, 5)
    indices = jnp.zeros(len(flat), jnp.int32).at[3:].set(1)
    stats = CodebookStats.zeros(16, 5)
    for _ in range(3):
        stats = vq.update_by_average(stats, flat, indices, jnp.ones(len(flat)), decay=0.9)
    moved = vq.mean_codes(stats, CODEBOOK, nothing=False)
    np.testing.assert_allclose(moved[0], flat[:3].mean(0), rtol=1e-5)
    np.testing.assert_allclose(moved[1], flat[3:].mean(0), rtol=1e-5)
    np.testing.assert_array_equal(moved[2:], CODEBOOK[2:])


def test_weight_0_leaves_vectors_out():
    flat = Z_E.reshape(-1, 5)
    weight = jnp.zeros(len(flat)).at[4].set(1.0)
    stats = vq.update_by_average(
        CodebookStats.zeros(16, 5), flat, jnp.zeros(len(flat), jnp.int32), weight, decay=0.5
    )
    np.testing.assert_allclose(vq.mean_codes(stats, CODEBOOK, nothing=False)[0], flat[4], rtol=1e-5)


def test_revive_restarts_dead_codes_at_weighted_vectors():
    flat = Z_E.reshape(-1, 5)
    stats = CodebookStats(count=jnp.ones(16).at[5].set(0.0), total=CODEBOOK)
    weight = jnp.zeros(len(flat)).at[7].set(1.0)
    revived = vq.revive(jax.random.key(0), stats, flat, weight, below=0.1)
    np.testing.assert_allclose(revived.total[5], flat[7])
    np.testing.assert_array_equal(jnp.delete(revived.total, 5, 0), jnp.delete(CODEBOOK, 5, 0))
    unchanged = vq.revive(jax.random.key(0), stats, flat, jnp.zeros(len(flat)), below=0.1)
    np.testing.assert_array_equal(unchanged.total, stats.total)


def test_code_0_says_nothing_from_the_start():
    book = vq.init_codebook(jax.random.key(0), (16, 5), nothing=True)
    assert (book[0] == 0).all() and (book[1:] != 0).all()
    assert (vq.init_codebook(jax.random.key(0), (16, 5)) != 0).all()
