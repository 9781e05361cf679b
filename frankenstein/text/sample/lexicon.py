"""The words: nouns by kind, verbs with what they take, adjectives with antonyms, places and times.

Each concept is known by a key and has one or more names (synonyms); pairs are split and scored by concepts.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Noun:
    """A noun concept; names are (word, gender) synonyms, the first one the usual word."""

    key: str
    kind: str
    names: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Verb:
    """A transitive verb; group joins verbs that say too much about each other to be called unrelated."""

    key: str
    names: tuple[str, ...]
    agents: tuple[str, ...]
    patients: tuple[str, ...]
    group: str


@dataclass(frozen=True)
class Adjective:
    """An adjective; aspect is the scale it is a point of, copula the verb that joins it to a noun."""

    key: str
    names: tuple[str, ...]
    antonym: str | None
    aspect: str
    copula: str
    kinds: tuple[str, ...]


# masculine/feminine, synonyms after "=".
_PEOPLE = """
médico/médica=doctor/doctora maestro/maestra=profesor/profesora abogado/abogada=letrado/letrada
alumno/alumna=estudiante/estudiante campesino/campesina=agricultor/agricultora periodista/periodista=reportero/reportera
enfermero/enfermera panadero/panadera cantante/cantante pintor/pintora bombero/bombera
cartero/cartera vecino/vecina secretario/secretaria
peluquero/peluquera jardinero/jardinera pescador/pescadora turista/turista carpintero/carpintera camarero/camarera
"""
_THINGS = {
    "animal": """perro:m gato:m caballo:m vaca:f oveja:f burro:m=asno:m lobo:m zorro:m conejo:m cabra:f pato:m ratón:m
        mono:m león:m águila:f tigre:m""",
    "fruit": "manzana:f pera:f naranja:f sandía:f melón:m plátano:m",
    "vehicle": "coche:m=automóvil:m bicicleta:f camión:m moto:f=motocicleta:f furgoneta:f",
    "furniture": "mesa:f silla:f sofá:m armario:m cama:f",
    "garment": "camisa:f falda:f abrigo:m sombrero:m vestido:m chaqueta:f",
    "instrument": "guitarra:f piano:m violín:m flauta:f tambor:m",
    "reading": "libro:m carta:f periódico:m=diario:m revista:f novela:f",
    "jewel": "anillo:m=sortija:f collar:m pulsera:f broche:m",
    "tool": "martillo:m sierra:f hacha:f pala:f destornillador:m",
    "device": "lámpara:f teléfono:m ordenador:m=computadora:f cámara:f reloj:m",
    "toy": "pelota:f muñeca:f cometa:f trompo:m=peonza:f puzle:m",
    "flower": "rosa:f tulipán:m margarita:f clavel:m",
    "container": "caja:f maleta:f mochila:f cesta:f=canasta:f",
    "food": "pan:m queso:m sopa:f pastel:m=tarta:f pescado:m",
}
# The general word for a kind; kinds that have no natural one are left out.
HYPERNYMS = {
    "person": ("persona", "f"),
    "animal": ("animal", "m"),
    "fruit": ("fruta", "f"),
    "vehicle": ("vehículo", "m"),
    "furniture": ("mueble", "m"),
    "garment": ("prenda", "f"),
    "instrument": ("instrumento", "m"),
    "jewel": ("joya", "f"),
    "tool": ("herramienta", "f"),
    "device": ("aparato", "m"),
    "toy": ("juguete", "m"),
    "flower": ("flor", "f"),
    "food": ("alimento", "m"),
}
ANIMATE = ("person", "animal")

# names | agents | patients | group
_VERBS = """
comprar=adquirir|person|fruit vehicle furniture garment instrument reading jewel tool device toy container food|trade
vender|person|fruit vehicle furniture garment instrument reading jewel tool device toy flower container food|trade
perder|person|garment reading jewel tool device toy container|hide
encontrar=hallar|person|person animal garment reading jewel tool device toy container|find
buscar|person|person animal garment reading jewel tool device toy container|find
esconder=ocultar|person|garment reading jewel tool toy container fruit food|hide
romper|person|furniture instrument toy device|harm
reparar=arreglar|person|vehicle furniture instrument device toy|mend
limpiar|person|vehicle furniture instrument tool device jewel container|clean
pintar|person|vehicle furniture container toy|paint
mostrar=enseñar|person|vehicle furniture garment instrument reading jewel tool device toy flower|hide
robar|person|vehicle jewel device reading container instrument tool|trade
elegir=escoger|person|fruit vehicle furniture garment instrument reading jewel tool device toy flower|trade
usar=utilizar|person|vehicle tool device instrument|use
leer|person|reading|look
lavar|person|fruit vehicle garment animal|clean
fotografiar|person|person animal vehicle flower furniture jewel|look
dibujar|person|person animal fruit vehicle furniture instrument flower|look
recoger|person|fruit flower toy garment container|take
traer|person|fruit garment tool toy flower food container furniture|bring
llevar=transportar|person|furniture container instrument|bring
probar|person|fruit food|eat
preparar|person|food|cook
cortar|person|fruit food flower|cut
guardar|person|garment tool toy reading jewel|hide
alquilar=arrendar|person|vehicle|trade
mirar=observar|person animal|person animal|look
saludar|person|person|greet
ayudar|person|person|help
perseguir|person animal|person animal|follow
seguir|person animal|person animal|follow
empujar|person|person animal furniture vehicle|push
cuidar|person|person animal|help
visitar|person|person|greet
felicitar|person|person|praise
elogiar=alabar|person|person|praise
criticar|person|person|praise
contratar|person|person|hire
despedir|person|person|hire
atacar|animal|person animal|harm
defender|person|person animal|help
asustar=espantar|person animal|person animal|scare
despertar|person animal|person animal|wake
curar=sanar|person|person animal|help
rescatar=salvar|person|person animal|help
esperar|person|person|wait
escuchar|person|person|listen
vigilar|person animal|person animal|look
engañar|person|person|deceive
alimentar|person|animal|help
"""
# names | antonym | aspect | copula | kinds
_OBJECTS = "vehicle furniture garment instrument jewel tool device toy container reading"
_ADJECTIVES = f"""
alto|bajo|height|ser|person
bajo|alto|height|ser|person
joven|viejo|age|ser|person animal
viejo|joven|age|ser|person animal
rico=adinerado|pobre|wealth|ser|person
pobre|rico|wealth|ser|person
famoso=célebre|desconocido|fame|ser|person
desconocido|famoso|fame|ser|person
valiente|cobarde|courage|ser|person animal
cobarde|valiente|courage|ser|person animal
fuerte|débil|strength|ser|person animal
débil|fuerte|strength|ser|person animal
alegre=contento|triste|mood|estar|person
triste|alegre|mood|estar|person
tranquilo=sereno|nervioso|mood|estar|person animal
nervioso|tranquilo|mood|estar|person animal
sano|enfermo|strength|estar|person animal
enfermo|sano|strength|estar|person animal
despierto|dormido|mood|estar|person animal
dormido|despierto|mood|estar|person animal
rubio|moreno|hair|ser|person
moreno|rubio|hair|ser|person
inteligente=listo||mind|ser|person animal
rápido=veloz|lento|speed|ser|animal vehicle
lento|rápido|speed|ser|animal vehicle
grande|pequeño|size|ser|animal fruit flower food {_OBJECTS}
pequeño|grande|size|ser|animal fruit flower food {_OBJECTS}
nuevo|usado|use|ser|{_OBJECTS}
usado|nuevo|use|ser|{_OBJECTS}
caro=costoso|barato|price|ser|{_OBJECTS}
barato=económico|caro|price|ser|{_OBJECTS}
bonito=lindo|feo|beauty|ser|flower {_OBJECTS}
feo|bonito|beauty|ser|flower {_OBJECTS}
pesado|ligero|size|ser|{_OBJECTS}
ligero|pesado|size|ser|{_OBJECTS}
limpio|sucio|dirt|estar|{_OBJECTS}
sucio|limpio|dirt|estar|{_OBJECTS}
lleno|vacío|size|estar|container
vacío|lleno|size|estar|container
abierto|cerrado|closure|estar|container
cerrado|abierto|closure|estar|container
caliente|frío|heat|estar|food
frío|caliente|heat|estar|food
negro||color|ser|animal {_OBJECTS}
blanco||color|ser|animal flower {_OBJECTS}
rojo||color|ser|fruit flower {_OBJECTS}
verde||color|ser|fruit {_OBJECTS}
azul||color|ser|flower {_OBJECTS}
amarillo||color|ser|fruit flower {_OBJECTS}
gris||color|ser|animal {_OBJECTS}
"""
# Adjectives of passing states are predicates here, never modifiers of a noun phrase.
_PREDICATE_ONLY = frozenset({"despierto", "dormido", "sano", "alegre", "desconocido", "abierto", "cerrado", "pesado"})

_PLACES = """el parque|la plaza|el mercado|la escuela=el colegio|el hospital|la playa|el bosque|la estación|el jardín|\
la oficina|el museo|la tienda=el comercio|el puerto|la granja|la biblioteca|el teatro|la calle|el pueblo=la aldea"""
PLACES = {line.split("=")[0].split()[-1]: tuple(line.split("=")) for line in _PLACES.split("|")}
# Places of which nobody can be in two at once.
APART = ("mercado", "escuela", "hospital", "playa", "bosque", "estación", "museo", "granja")
TIMES = {
    "past": (
        ("ayer",),
        ("esta mañana", "hoy por la mañana"),
        ("la semana pasada",),
        ("el mes pasado",),
        ("el año pasado",),
        ("hace dos días", "anteayer"),
        ("el lunes",),
        ("el martes",),
        ("el viernes",),
        ("el domingo",),
    ),
    "future": (
        ("mañana",),
        ("la semana que viene", "la próxima semana"),
        ("el mes que viene", "el próximo mes"),
        ("el año que viene", "el próximo año"),
        ("el sábado",),
        ("el jueves",),
    ),
}
TIME_NAMES = {names[0]: names for table in TIMES.values() for names in table}


def _people() -> list[Noun]:
    found = []
    for entry in _PEOPLE.split():
        roles = [synonym.split("/") for synonym in entry.split("=")]
        for index, gender in enumerate("mf"):
            names = tuple((role[index], gender) for role in roles)
            found.append(Noun(f"{names[0][0]}.{gender}", "person", names))
    return found


def _things() -> list[Noun]:
    found = []
    for kind, table in _THINGS.items():
        for entry in table.split():
            words = [name.split(":") for name in entry.split("=")]
            found.append(Noun(words[0][0], kind, tuple((word, gender) for word, gender in words)))
    return found


def _general() -> list[Noun]:
    return [Noun(word, kind, ((word, gender),)) for kind, (word, gender) in HYPERNYMS.items()]


def _verbs() -> list[Verb]:
    found = []
    for line in _VERBS.strip().splitlines():
        names, agents, patients, group = line.split("|")
        synonyms = tuple(names.split("="))
        found.append(Verb(synonyms[0], synonyms, tuple(agents.split()), tuple(patients.split()), group))
    return found


def _adjectives() -> list[Adjective]:
    found = []
    for line in _ADJECTIVES.strip().splitlines():
        names, antonym, aspect, copula, kinds = line.split("|")
        synonyms = tuple(names.split("="))
        found.append(Adjective(synonyms[0], synonyms, antonym or None, aspect, copula, tuple(kinds.split())))
    return found


SPECIFIC = tuple(_people() + _things())
NOUNS = {noun.key: noun for noun in (*SPECIFIC, *_general())}
VERBS = {verb.key: verb for verb in _verbs()}
ADJECTIVES = {adjective.key: adjective for adjective in _adjectives()}
KINDS = ("person", *_THINGS)
BY_KIND = {kind: tuple(noun.key for noun in SPECIFIC if noun.kind == kind) for kind in KINDS}
MODIFIERS = {
    kind: tuple(a.key for a in ADJECTIVES.values() if kind in a.kinds and a.key not in _PREDICATE_ONLY)
    for kind in KINDS
}
OPPOSITES = {
    kind: tuple(a.key for a in ADJECTIVES.values() if kind in a.kinds and a.antonym is not None) for kind in KINDS
}
