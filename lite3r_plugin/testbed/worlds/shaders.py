"""Programs of the world renderer in OpenGL's shading language (GLSL 3.30)."""

MAX_VIEWS = 32  # of a clip: the length of `gain` in RESOLVE

VERTEX = """#version 330
in vec3 in_p; in vec3 in_n; in vec4 in_t; in vec3 in_c; in vec3 in_k;
uniform mat3 R; uniform vec3 eye; uniform vec4 proj; uniform vec2 clipz;
out vec3 p; out vec3 n; out vec2 uv; out vec2 lm; out vec3 col; out float z; flat out vec3 kind;
void main() {
    vec3 c = R * (in_p - eye);
    p = in_p; n = in_n; uv = in_t.xy; lm = in_t.zw; col = in_c; kind = in_k; z = c.z;
    gl_Position = vec4(proj.x * c.x + proj.z * c.z, proj.y * c.y + proj.w * c.z, clipz.x * c.z + clipz.y, c.z);
}"""

SKY_MODEL = """
uniform vec3 sky_up, sky_low, sun_dir, sun_rgb; uniform vec2 cloud;
float h2(vec2 p) { return fract(sin(dot(p, vec2(127.1, 311.7))) * 43758.5453); }
float vn(vec2 p) { vec2 i = floor(p), f = fract(p); f = f * f * (3. - 2. * f);
    return mix(mix(h2(i), h2(i + vec2(1, 0)), f.x), mix(h2(i + vec2(0, 1)), h2(i + vec2(1, 1)), f.x), f.y); }
vec3 sky(vec3 d) {
    float e = clamp(d.z, 0., 1.);
    vec3 c = mix(sky_low, sky_up, pow(e, .55));
    vec2 q = d.xy / (max(d.z, 0.) + .12) * 1.4 + cloud.y;
    float f = 0., a = .5; for (int i = 0; i < 4; i++) { f += a * vn(q); q *= 2.03; a *= .5; }
    c = mix(c, vec3(dot(sky_low, vec3(.4))) + .25, smoothstep(.45, .75, f) * cloud.x * smoothstep(0., .15, d.z));
    return c + sun_rgb * .6 * pow(max(dot(d, sun_dir), 0.), 400.);
}
"""

COLOUR = (
    """#version 330
in vec3 p; in vec3 n; in vec2 uv; in vec2 lm; in vec3 col; in float z; flat in vec3 kind;
uniform sampler2DArray tex, pages; uniform sampler2DShadow shadow;
uniform vec3 eye, amb_up, amb_low, lamp_pos, lamp_rgb; uniform vec3 mixw; uniform mat4 sun_m; uniform vec2 lamp_k; uniform int skip_alpha;
"""
    + SKY_MODEL
    + """
out vec4 o;
float h3(vec3 p) { p = fract(p * .3183099 + .1); p *= 17.; return fract(p.x * p.y * p.z * (p.x + p.y + p.z)); }
float vn3(vec3 p) { vec3 i = floor(p), f = fract(p); f = f * f * (3. - 2. * f);
    return mix(mix(mix(h3(i), h3(i + vec3(1, 0, 0)), f.x), mix(h3(i + vec3(0, 1, 0)), h3(i + vec3(1, 1, 0)), f.x), f.y),
               mix(mix(h3(i + vec3(0, 0, 1)), h3(i + vec3(1, 0, 1)), f.x),
                   mix(h3(i + vec3(0, 1, 1)), h3(i + vec3(1, 1, 1)), f.x), f.y), f.z); }
float grain(vec3 p, float px) {  // fine surface noise fixed to the world; octaves finer than two pixels fade out
    float a = 0., s = 3.;
    for (int i = 0; i < 4; i++) {
        float w = 1. - smoothstep(.2, .6, px * s);
        if (w > 0.) a += w * (vn3(p * s + float(i) * 7.3) - .5);
        s *= 2.7;
    }
    return a;
}
void main() {
    int k = int(kind.z + .5);
    vec4 t = texture(tex, vec3(uv, kind.x));
    vec3 v = normalize(p - eye), g = normalize(cross(dFdx(p), dFdy(p)));
    if (dot(g, v) > 0.) g = -g;
    float px = length(fwidth(p));
    if ((k & 2) != 0 && (skip_alpha == 1 || t.a < .5)) discard;
    if ((k & 1) != 0) { o = vec4(sky(v), 1.); return; }
    vec3 m = normalize(n); if (dot(m, g) < 0.) m = -m;
    m = normalize(mix(g, m, smoothstep(.7, .9, dot(m, g))));
    vec3 base = pow(t.rgb, vec3(2.2)), baked = vec3(0.);
    if (kind.y >= 0.) baked = pow(texture(pages, vec3(lm, kind.y)).rgb * 2., vec3(2.2));
    else if (mixw.y > .5) baked = pow(col * 2., vec3(2.2));
    if (lamp_k.y > 0.) base *= exp(lamp_k.y * grain(p, px));
    if (mixw.y < .5) base *= mix(vec3(1.), col, .85);
    vec4 s = sun_m * vec4(p + g * .03, 1.); s.xyz = s.xyz * .5 + .5;
    float lit = 1.;
    if (all(greaterThan(s.xyz, vec3(0.))) && all(lessThan(s.xyz, vec3(1.)))) {
        vec3 corner = s.xyz - vec3(.5 * mixw.z, .5 * mixw.z, .0006);
        lit = 0.; for (int i = 0; i < 4; i++) lit += .25 * texture(shadow, corner + vec3(i & 1, i >> 1, 0.) * mixw.z);
    }
    vec3 L = mix(amb_low, amb_up, m.z * .5 + .5) + sun_rgb * lit * max(dot(m, sun_dir), 0.);
    vec3 w = lamp_pos - p; float d2 = dot(w, w);
    L += lamp_rgb * (.25 + .75 * max(dot(m, w) * inversesqrt(d2 + 1e-4), 0.)) / (1. + d2 * lamp_k.x);
    L = baked * mixw.x + L;
    if ((k & 4) != 0) L = vec3(max(dot(L, vec3(.33)), 1.));
    o = vec4(min(base * L, vec3(30.)), 1.);
}"""
)

DEPTH = """#version 330
in vec3 p; in vec3 n; in vec2 uv; in vec2 lm; in vec3 col; in float z; flat in vec3 kind;
uniform sampler2DArray tex; uniform int skip_alpha; out float o;
void main() {
    int k = int(kind.z + .5);
    if ((k & 2) != 0 && (skip_alpha == 1 || texture(tex, vec3(uv, kind.x)).a < .5)) discard;
    o = (k & 1) != 0 ? 0. : z;
}"""

SHADOW_VERTEX = """#version 330
in vec3 in_p; in vec4 in_t; in vec3 in_k; uniform mat4 sun_m; out vec2 uv; flat out vec3 kind;
void main() { uv = in_t.xy; kind = in_k; gl_Position = sun_m * vec4(in_p, 1.); }"""
SHADOW = """#version 330
in vec2 uv; flat in vec3 kind; uniform sampler2DArray tex;
void main() { int k = int(kind.z + .5); if ((k & 1) != 0 || ((k & 2) != 0 && texture(tex, vec3(uv, kind.x)).a < .5)) discard; }"""

QUAD_VERTEX = """#version 330
in vec2 in_q; out vec2 q; void main() { q = in_q; gl_Position = vec4(in_q, 0., 1.); }"""
BACKGROUND = (
    """#version 330
in vec2 q; uniform mat3 R; uniform vec4 proj; out vec4 o;
"""
    + SKY_MODEL
    + """
void main() { vec3 c = vec3((q.x - proj.z) / proj.x, (q.y - proj.w) / proj.y, 1.); o = vec4(sky(normalize(c * R)), 1.); }"""
)

RESOLVE = """#version 330
uniform sampler2D hdr; uniform ivec4 lay; uniform vec4 gain[32]; uniform vec4 film; uniform float seed; out vec4 o;
float h(vec3 p) { p = fract(p * .1031); p += dot(p, p.zyx + 31.32); return fract((p.x + p.y) * p.z); }
void main() {
    ivec2 px = ivec2(gl_FragCoord.xy), tile = px / lay.xy; int ss = lay.z, view = tile.y * lay.w + tile.x;
    float b = film.x; int r = b > .05 ? int(ceil(b * 2. * float(ss))) : 0;
    ivec2 lo = tile * lay.xy * ss, hi = lo + lay.xy * ss - 1;
    vec3 a = vec3(0.); float W = 0.; vec2 mid = (vec2(px) + .5) * float(ss) - .5;
    for (int y = -r; y < ss + r; y++) for (int x = -r; x < ss + r; x++) {
        ivec2 s = clamp(px * ss + ivec2(x, y), lo, hi); vec2 d = (vec2(s) - mid) / float(ss);
        float w = r > 0 ? exp(-.5 * dot(d, d) / (b * b)) : 1.;
        vec3 c = texelFetch(hdr, s, 0).rgb * gain[view].rgb; a += w * clamp(c / (1. + .25 * c) * 1.2, 0., 1.); W += w;
    }
    a = pow(a / W, vec3(1. / 2.2)); float l = dot(a, vec3(.3, .59, .11));
    a = (mix(vec3(l), a, film.z) - .5) * film.w + .5;
    vec3 q = vec3(gl_FragCoord.xy, seed);
    for (int i = 0; i < 3; i++) { float u = h(q + 17. * float(i)) + h(q + 91.3 + 7. * float(i)) + h(q + 3.7 + 29. * float(i)) - 1.5;
        a[i] += u * 2. * film.y * (.6 + .4 * l); }
    o = vec4(clamp(a, 0., 1.), 1.);
}"""
