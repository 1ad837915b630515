"""Words in the names of columns, in a few languages, by which one guesses what a column is."""

import re
from collections.abc import Collection


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _stems(text: str) -> tuple[str, ...]:
    """Beginnings of words."""
    return tuple(text.split())


ID_WORDS = _words("code guid hash id ids idx index key no nr num number pk ref sk uuid")
_QUALIFIERS = _words("anon anonymous encrypted external full hashed internal masked pseudo unique")
"""Words that do not change whom an id names."""
KEY_WORDS = {
    "user": _words(
        "account acct applicant benutzer borrower buyer candidat cardholder client cliente comprador consumer cust "
        "customer donor employee gamer guest haushalt hogar household kunde kunden learner lector listener member "
        "nutzer panelist participant passenger patient payer person player policyholder profile purchaser rater reader "
        "recipient renter requester respondent reviewer rider searcher shopper socio student subscriber tourist "
        "traveler traveller uid user userid username usr usuario utilisateur viewer visitor visitorid voter"
    ),
    "candidate": _words(
        "ad annonce anuncio anzeige app article articulo artikel asin book business candidate clip content course "
        "creative destination doc document episode exercise film game gif hotel iid item itemid job lesson "
        "listing movie news oferta offer pelicula place podcast poi post product producto produit produkt "
        "prop property question recipe restaurant show sku song story titel track venue video"
    ),
    "request": _words(
        "anfrage auction basket batch bid busqueda consulta display exposure feed impression impressionid list "
        "liste order page pageview pagina peticion query rec reco recommendation render req request search slate "
        "srch suche view warenkorb"
    ),
}
FALLBACK_KEY_WORDS = {
    "user": _words("browser cookie device email hh ip login msisdn sesion session sitzung tenant wallet worker"),
    "candidate": frozenset[str](),
    "request": _words("besuch sesion session sitzung visit visita"),
}
"""Of what may stand for it where no column has a better name."""
TIME_WORDS = _words(
    "anzeige at created date datetime datum day dt epoch event exposure fecha gezeigt heure hora impression log "
    "logged micros momento ms request s served shown since tag time timestamp ts unix utc view viewed visit when "
    "zeit zeitpunkt"
)
GROUP_WORDS = _words(
    "agent area browser campaign carrier channel city class country county currency device district grid group hour "
    "keyword language locale location month os page platform plz postal query referrer region search segment shop site "
    "source state store street term text type ua url version warehouse week year zip zipcode zone"
)
"""Words for places, groups and times that many users share."""
CLOCK_WORDS = _words(
    "created date datetime datum day dt epoch fecha hour hora stunde time timestamp ts unix utc zeit zeitpunkt"
)
"""Of times that may be written as other numbers."""
PLACEMENT_WORDS = _words(
    "carousel column display mailer orden placement platz pos posicion position rang rank row shelf slot"
)
SAMPLING_WORDS = _words("abtastrate kept muestreo sample samplerate sampling samplingrate stichprobe")
WEIGHT_WORDS = _words("gewicht instanceweight peso sampleweight weight weights wgt")
WEIGHT_QUALIFIERS = _words("instance person row sample survey w")
PAST_WORDS = _words(
    "already avg before cnt count ctr days ever frueher hist history last mean num past prev previous previously "
    "prior rate since total verified vorher was"
)
"""Of what was known already: a count of earlier clicks is no label."""
CODE_WORDS = _words("cat category class code group id key kind nr plz segment typ type zip")
"""Of integers that are names of things."""
EVENT_TYPE_WORDS = _words("action art event evento kind typ type")
LABEL_STEMS = _stems(
    "abon accept action again angesehen appl attrit behalten bestellt block book bought bounc buy call cancel cart "
    "checkout churn clic click clk comment complain complet compr contact contrat conv devuel dislik download "
    "downvot engag enjoy exit fav finish follow forward fraud gef gekauft geöffnet gust happy hate hid hire hit insta "
    "kauf keep kept klick label lead lik listen lov match open order outcome pagad paid play pleas posit purchas rated "
    "read rebought recommend refund reject repeat repl report reserv respon retain retour return satisf sav seen shar "
    "skip sold spam stay storn subscri succes surviv swip target unfollow unsub upvot view vio visit vist vote watch "
    "wieder won zufrieden"
)
NEGATIVE_STEMS = _stems(
    "attrit block bounc cancel churn complain devuel dislik downvot exit fraud hate hid refund reject report retour "
    "return skip spam storn unfollow unsub"
)
"""Of what a good candidate has none of."""
_NOT = _words("kein keine nicht no non not")
OUTCOME_STEMS = _stems(
    "amount answer bestell betrag bezahlt checkout click conver deliver duration dwell engag feedback gasto gmv "
    "importe listen margin menge minutes paid payment profit purchas qty quantity rating refund return revenue "
    "review sales scroll seconds shipped spend spent stars survey umsatz verweil watch"
)
"""Of what is known after the request alone."""
NUMERIC_LABEL_STEMS = _stems(
    "bewertung dwell estrellas grade hours label listen minutes note overall puntu rate rating response revenue review "
    "score seconds spend stars sterne target watch"
)
"""Of numbers that may be predicted."""


def split_words(name: str) -> list[str]:
    """Lower-case words of a name, split at capitals and at all that is no letter."""
    parts = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name)
    return [each for each in re.split(r"[\W_\d]+", parts.lower()) if each]


def has_only(name: str, hints: Collection[str]) -> bool:
    """Whether a name holds a word of hints, and nothing else that matters: user_id is a user, user_country none."""
    words = split_words(name)
    if len(words) == 1:  # as in kundennr
        return any(
            words[0] == each or (len(each) > 3 and words[0] in {each + end for end in ID_WORDS}) for each in hints
        )
    return any(each in hints for each in words) and all(
        each in hints or each in ID_WORDS | _QUALIFIERS for each in words
    )


def match_key_name(name: str, key_name: str) -> int:
    """2 where a name is that of a key's column, 1 where such a column may stand for one, else 0."""
    strong = KEY_WORDS[key_name]
    return 2 if has_only(name, strong) else int(has_only(name, strong | FALLBACK_KEY_WORDS[key_name]))


def is_negative_label(name: str) -> bool:
    """Whether a label's name is of what a good candidate has none of."""
    return has_stem(name, NEGATIVE_STEMS) and not has_word(name, _NOT)


def is_id_name(name: str) -> bool:
    """Whether a name is that of ids, so that its numbers are no times, however large."""
    things = any(has_only(name, hints) for purposes in (KEY_WORDS, FALLBACK_KEY_WORDS) for hints in purposes.values())
    return (has_word(name, ID_WORDS) and not has_word(name, CLOCK_WORDS)) or (things and not has_word(name, TIME_WORDS))


def has_word(name: str, hints: frozenset[str]) -> bool:
    """Whether one of the words of a name is in hints."""
    return not hints.isdisjoint(split_words(name))


def has_stem(name: str, stems: tuple[str, ...]) -> bool:
    """Whether one of the words of a name begins with a stem."""
    return any(each.startswith(stems) for each in split_words(name))
