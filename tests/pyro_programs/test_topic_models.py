"""LDA with enumerated words and amortised point estimates of topics per document, and ProdLDA, a VAE of word counts."""

from contextlib import nullcontext
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from tests.pyro_programs.pairs import Pair, assert_same, assert_same_draws, elbo_in_parts, elbo_of

DOCUMENTS, WORDS, TOPICS, VOCABULARY = 30, 5, 2, 4


def topics_of(words: Tensor, network: nn.Module) -> Tensor:
    counts = torch.zeros(len(words), VOCABULARY).scatter_add(1, words, torch.ones(words.shape))
    return network(counts)


def lda(words: Tensor) -> None:
    """`words` `(documents, words)`."""
    with pyro.plate("topics", TOPICS):
        topic_weights = pyro.sample("topic_weights", dist.Gamma(4.0 / TOPICS, 1.0))
        topic_words = pyro.sample("topic_words", dist.Dirichlet(torch.ones(VOCABULARY)))
    with pyro.plate("documents", len(words)):
        doc_topics = pyro.sample("doc_topics", dist.Dirichlet(topic_weights))
        with pyro.plate("words", WORDS):
            word_topics = pyro.sample("word_topics", dist.Categorical(doc_topics), infer={"enumerate": "parallel"})
            pyro.sample("doc_words", dist.Categorical(topic_words[word_topics]), obs=words.T)


class LDAGuide(nn.Module):
    """Gammas and Dirichlets for the topics; `doc_topics` is a Delta at a network's output, or a Dirichlet there."""

    def __init__(self, *, delta: bool) -> None:
        super().__init__()
        self.predictor = nn.Sequential(nn.Linear(VOCABULARY, 6), nn.Sigmoid(), nn.Linear(6, TOPICS), nn.Softmax(-1))
        self.delta = delta

    def forward(self, words: Tensor) -> None:
        pyro.module("predictor", self.predictor)
        self.topics()
        doc_topics = topics_of(words, self.predictor)
        with pyro.plate("documents", len(words)):
            fn = dist.Delta(doc_topics, event_dim=1) if self.delta else dist.Dirichlet(2.0 + 4.0 * doc_topics)
            pyro.sample("doc_topics", fn)

    def topics(self) -> None:
        positive, above = dist.constraints.positive, dist.constraints.greater_than(0.5)
        weights = pyro.param("topic_weights_posterior", lambda: 30.0 + torch.rand(TOPICS), constraint=positive)
        words = pyro.param(
            "topic_words_posterior",
            lambda: torch.tensor([36.0, 22.0, 8.0, 8.0]).expand(TOPICS, VOCABULARY),
            constraint=above,
        )
        with pyro.plate("topics", TOPICS):
            pyro.sample("topic_weights", dist.Gamma(weights, 8.0))
            pyro.sample("topic_words", dist.Dirichlet(words))

    def clean(self, words: Tensor) -> None:
        """Without the Delta."""
        self.topics()


def documents() -> Tensor:
    return dist.Categorical(torch.tensor([0.5, 0.3, 0.1, 0.1])).sample((DOCUMENTS, WORDS))


def test_lda_given_topics_of_documents(mode: Any) -> None:
    words, guide = documents(), LDAGuide(delta=True)
    doc_topics = topics_of(words, guide.predictor).detach()

    def clean(words: Tensor) -> None:
        """`lda` with `doc_topics` at the network's output, where its prior depends on the weights of topics."""
        with pyro.plate("topics", TOPICS):
            topic_weights = pyro.sample("topic_weights", dist.Gamma(4.0 / TOPICS, 1.0))
            topic_words = pyro.sample("topic_words", dist.Dirichlet(torch.ones(VOCABULARY)))
        with pyro.plate("documents", len(words)):
            pyro.sample("doc_topics", dist.Dirichlet(topic_weights), obs=doc_topics)
            with pyro.plate("words", WORDS):
                word_topics = pyro.sample("word_topics", dist.Categorical(doc_topics), infer={"enumerate": "parallel"})
                pyro.sample("doc_words", dist.Categorical(topic_words[word_topics]), obs=words.T)

    guide(words)
    pair = Pair(lda, guide, (words,), DOCUMENTS, plate="documents", clean=(clean, guide.clean), nesting=2)
    ledger = pair.ledger(mode)
    assert_same(elbo_of(ledger, DOCUMENTS), pair.elbo_of_pyro())
    assert "doc_topics" in str(ledger)


@pytest.mark.filterwarnings("ignore:model. it runs once for every particle:UserWarning")
def test_lda_with_distributions() -> None:
    """Announced as evaluated one particle at a time, because Dirichlets have no batching rule."""
    words, guide = documents(), LDAGuide(delta=False)
    guide(words)
    pair = Pair(lda, guide, (words,), DOCUMENTS, plate="documents", nesting=2)
    assert_same(elbo_in_parts(pair), pair.elbo_of_pyro())


class ProdLDA(nn.Module):
    """Srivastava and Sutton (2017): batch normalisation and dropout on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.beta = nn.Sequential(
            nn.Dropout(0.2), nn.Linear(TOPICS, VOCABULARY, bias=False), nn.BatchNorm1d(VOCABULARY, affine=False)
        )
        self.body = nn.Sequential(nn.Linear(VOCABULARY, 8), nn.Softplus(), nn.Dropout(0.2))
        self.loc = nn.Sequential(nn.Linear(8, TOPICS), nn.BatchNorm1d(TOPICS, affine=False))
        self.scale = nn.Sequential(nn.Linear(8, TOPICS), nn.BatchNorm1d(TOPICS, affine=False))

    def model(self, counts: Tensor) -> None:
        pyro.module("decoder", self.beta)
        with pyro.plate("documents", len(counts)):
            log_theta = pyro.sample("logtheta", dist.Normal(counts.new_zeros(len(counts), TOPICS), 1.0).to_event(1))
            shares = self.beta(log_theta.softmax(-1)).softmax(-1)
            pyro.sample("obs", dist.Multinomial(int(counts.sum(-1).max()), shares), obs=counts)

    def guide(self, counts: Tensor) -> None:
        pyro.module("encoder", self.body)
        with pyro.plate("documents", len(counts)):
            hidden = self.body(counts)
            pyro.sample("logtheta", dist.Normal(self.loc(hidden), (0.5 * self.scale(hidden)).exp()).to_event(1))


def test_prodlda(mode: Any) -> None:
    """Taken in training mode; the ledger is of the evaluation mode, and says so."""
    prodlda = ProdLDA().train()
    counts = torch.zeros(DOCUMENTS, VOCABULARY).scatter_add(1, documents(), torch.ones(DOCUMENTS, WORDS))
    counts[0, 0] += 2.0  # documents differ in length
    prodlda.guide(counts)  # as in training: batch statistics of some data
    prodlda.model(counts)
    pair = Pair(prodlda.model, prodlda.guide, (counts,), DOCUMENTS, repeats=50)
    expected = pytest.warns(UserWarning, match="runs eagerly") if mode == "captured" else nullcontext()
    with expected:  # the number of words depends on the data
        ledger = pair.ledger(mode)
    assert prodlda.training
    prodlda.eval()
    assert_same(elbo_of(ledger), pair.elbo_of_pyro())
    assert_same_draws(pair)
    assert "evaluation mode" in str(ledger)
